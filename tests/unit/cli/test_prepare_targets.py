"""The cache of a frozen encoder's features: what it holds, going on after a stop, parts, and what is refused."""

import json
import shutil

import pytest
import torch
import transformers
from PIL import Image
from sample_run import write_recipe, write_sample_data

from laver_mcore.cli import targets
from laver_mcore.data.images.source import LoadedImage
from laver_mcore.data.images.target_cache import TargetCache
from laver_mcore.data.images.wanted import WantedImage

SETTINGS = {
    "image_processor_type": "BitImageProcessor", "size": {"shortest_edge": 32}, "resample": 3,
    "crop_size": {"height": 28, "width": 28}, "image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225],
    **dict.fromkeys(("do_resize", "do_center_crop", "do_rescale", "do_normalize"), True),
}  # fmt: skip


@pytest.fixture
def run(tmp_path):
    """Data, a recipe, a frozen encoder."""
    write_sample_data(tmp_path, num_samples=12)
    write_recipe(tmp_path)
    torch.manual_seed(1)
    config = transformers.Dinov2Config(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, mlp_ratio=2, image_size=28, patch_size=7
    )
    transformers.Dinov2Model(config).save_pretrained(tmp_path / "dino")
    (tmp_path / "dino" / "preprocessor_config.json").write_text(json.dumps(SETTINGS))
    return tmp_path


def arguments(run, *more):
    flags = f"--objective viral --target-path {run}/dino --target-layers 2 --no-bf16 --batch-size 4 --images-per-file 5"
    return ["--config", str(run / "recipe.yaml"), "--output", str(run / "cache"), *flags.split(), *more]


def files(run):
    return sorted(path.name for path in (run / "cache").glob("features-*"))


def read(run):
    """Features of every picture, int16 [I, n, Z], by name."""
    pictures = sorted(run.glob("*.png"))
    wanted = [WantedImage(LoadedImage(path.name, path.read_bytes()), 40, 40) for path in pictures]
    found, failures = TargetCache(run / "cache")(wanted)
    assert failures == {}
    return found.view(torch.bfloat16), pictures


def oracle(run, pictures):
    """By transformers alone: the whole picture, as the recipe's tower sees it, at the encoder's size."""
    model = transformers.Dinov2Model.from_pretrained(run / "dino").eval()
    processor_class = getattr(transformers, "BitImageProcessorPil", None) or transformers.BitImageProcessor
    square = {**SETTINGS, "size": {"height": 28, "width": 28}, "do_center_crop": False}
    processor = processor_class.from_dict(square)
    opened = [Image.open(path).convert("RGB") for path in pictures]
    with torch.no_grad():
        return model(**processor(opened, return_tensors="pt")).last_hidden_state[:, 1:]


def test_features_are_the_encoders_and_are_computed_once(run, capsys, monkeypatch):
    assert targets.main(arguments(run)) == 0
    found, pictures = read(run)
    assert len(pictures) == 12
    torch.testing.assert_close(found, oracle(run, pictures).bfloat16(), rtol=2**-7, atol=2**-7)
    assert "12 images: 12 computed, 0 were there" in capsys.readouterr().out
    before = files(run)
    monkeypatch.setattr(targets, "decode_image", None)  # nothing is even decoded again
    assert targets.main(arguments(run)) == 0
    assert "12 images: 0 computed, 12 were there" in capsys.readouterr().out
    assert files(run) == before


def test_what_was_stopped_goes_on(run, monkeypatch, capsys):
    """Nothing that was computed is lost, not even what did not fill a file."""
    calls, encode = [], targets.Encoder.__call__

    def stop(self, images):
        calls.append(len(images))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return encode(self, images)

    monkeypatch.setattr(targets.Encoder, "__call__", stop)
    assert targets.main(arguments(run)) == 130
    assert "the same command goes on" in capsys.readouterr().err
    monkeypatch.setattr(targets.Encoder, "__call__", encode)
    assert targets.main(arguments(run)) == 0
    assert "12 images: 4 computed, 8 were there" in capsys.readouterr().out
    found, pictures = read(run)
    torch.testing.assert_close(found, oracle(run, pictures).bfloat16(), rtol=2**-7, atol=2**-7)


def test_parts_fill_one_cache_and_equal_files_are_one(run, capsys):
    shutil.copy(run / "000_0.png", run / "001_0.png")
    for part in range(3):
        assert targets.main(arguments(run, "--part", f"{part}/3")) == 0
    assert (
        sum(int(line.split(" computed")[0].split()[-1]) for line in capsys.readouterr().out.splitlines()[::2])
        == 11
    )
    assert {name.split("-")[1] for name in files(run)} == {"000", "001", "002"}
    read(run)


def test_a_picture_that_cannot_be_read_is_left_out_and_named(run, capsys):
    picture = run / "004_0.png"
    picture.write_bytes(picture.read_bytes()[:200])  # whose header can be read
    assert targets.main(arguments(run)) == 0
    out, err = capsys.readouterr()
    assert "left out: " in err and "004_0.png" in err
    assert "12 images: 11 computed, 0 were there or are the same, 1 left out" in out


REFUSED = {
    "no_encoder": (["--objective", "lm"], "the recipe has no frozen encoder"),
    "batch": (["--batch-size", "0"], "--batch-size must be at least 1"),
    "recipe": (["--config", "nowhere.yaml"], "nowhere.yaml"),
    "target": (["--target-path", "nowhere"], "nowhere"),
}


@pytest.mark.parametrize(("more", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_done_is_one_line(run, capsys, more, message):
    given = [
        a
        for a in arguments(run)
        if more[0] != "--objective" or not a.startswith(("--target", str(run / "dino")))
    ]
    if more[0] == "--objective":
        given = ["--config", str(run / "recipe.yaml"), "--output", str(run / "cache")]
    assert targets.main([*given, *more]) == 2
    err = capsys.readouterr().err.strip()
    assert message in err and "\n" not in err


def test_another_encoder_wants_another_folder(run, capsys):
    assert targets.main(arguments(run)) == 0
    assert targets.main(arguments(run, "--target-image-size", "42")) == 2
    assert "holds pixels=" in capsys.readouterr().err


@pytest.mark.parametrize("part", ["3/3", "-1/3", "1", "a/b", "1/"])
def test_a_part_that_is_none_is_refused(run, part, capsys):
    with pytest.raises(SystemExit) as stopped:
        targets.main(arguments(run, f"--part={part}"))
    assert stopped.value.code == 2 and "is not I/N" in capsys.readouterr().err
