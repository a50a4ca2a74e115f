"""The vision tower of docs/extending.md, installed as a package: accounted for, trained and exported."""

import json

import pytest
import torch
from long import LONG
from sample_run import write_recipe, write_sample_data
from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel

from integration.harness import REPOSITORY, python, torchrun
from integration.test_export import images_of, write_tower
from integration.test_objective_by_entry_point import path_with

# What the tests ask of the package, in a process that has it: visual tokens, and the account's weights.
ASK = """
import json, sys, torch
from laver_mcore.config.schema import VisionConfig
from laver_mcore.model.vision_encoders import build_vision_encoder
from laver_mcore.shapes.towers import tower_shape, tower_weights
path, out = sys.argv[1:]
encoder = build_vision_encoder("dinov2-registers", path=path)
pixels = torch.linspace(-1, 1, 2 * 3 * 32 * 32).view(2, 3, 32, 32)
shape = tower_shape(VisionConfig(vision="dinov2-registers", vision_path=path))
listed = {name: torch.Size(sides).numel() for name, sides, _ in tower_weights(shape)}
real = {name: weight.numel() for name, weight in encoder.tower.named_parameters()}
torch.save((encoder(pixels), pixels, listed, real, shape.prefix_tokens), out)
"""


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("registers")
    write_sample_data(directory, num_samples=16)
    write_recipe(directory)
    package = directory / "installed" / "toy-1.0.dist-info"
    package.mkdir(parents=True)
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: toy\nVersion: 1.0\n")
    entry = "[laver_mcore.towers]\ndinov2-registers = toy_tower:DINOV2_REGISTERS\n"
    (package / "entry_points.txt").write_text(entry)
    page = (REPOSITORY / "docs" / "extending.md").read_text().split("## A vision tower")[1]
    (package.parent / "toy_tower.py").write_text(page.split("```python\n")[1].split("```")[0])
    torch.manual_seed(0)
    write_tower(directory / "tower", "dinov2")  # its processor
    settings = dict(hidden_size=16, num_hidden_layers=3, num_attention_heads=2, mlp_ratio=2, image_size=32)
    model = Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**settings, patch_size=8))
    model.embeddings.register_tokens.data.normal_()
    model.save_pretrained(directory / "tower")
    return directory


def run(directory, *argv, ranks=1):
    start = python if ranks == 1 else lambda *a, **v: torchrun(ranks, *a, **v)
    return start(*argv, PYTHONPATH=path_with(directory / "installed"))


def test_its_tokens_are_those_of_transformers_behind_cls_and_registers(directory):
    done = run(directory, "-c", ASK, str(directory / "tower"), str(directory / "asked.pt"))
    assert done.returncode == 0, done.stderr[-3000:]
    tokens, pixels, listed, real, prefix = torch.load(directory / "asked.pt")
    model = Dinov2WithRegistersModel.from_pretrained(directory / "tower").eval()
    with torch.no_grad():
        wanted = model(pixel_values=pixels).last_hidden_state
    assert wanted.shape[1] == 5 + 16
    torch.testing.assert_close(tokens, wanted[:, 5:])
    assert listed == real
    assert prefix == 5


@LONG
def test_it_trains_and_is_exported(directory):
    flags = (
        f"--vision dinov2-registers --vision-path {directory}/tower --trainable vision_encoder.* connector.*"
    )
    for name, layout, ranks in (("tp1", "", 1), ("tp2", "--tensor-model-parallel-size 2", 2)):
        argv = f"pretrain_laver.py --config {directory}/recipe.yaml --train-iters 2 --no-tensorboard {flags}"
        done = run(directory, *argv.split(), *layout.split(), "--save", str(directory / name), ranks=ranks)
        assert done.returncode == 0, done.stderr[-4000:]
    losses = [
        [
            json.loads(line)["lm_loss"]
            for line in (directory / name / "metrics.jsonl").read_text().splitlines()
        ]
        for name in ("tp1", "tp2")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=2e-5)
    export = ["tools/mcore_to_hf.py", "--load", str(directory / "tp1"), "--save", str(directory / "exported")]
    done = run(directory, *export)
    assert done.returncode == 0, done.stderr[-4000:]
    # Where the package is not installed: the exported code needs none of it.
    from transformers import AutoModelForImageTextToText, AutoProcessor

    where = dict(pretrained_model_name_or_path=directory / "exported", trust_remote_code=True)
    model, processor = (
        AutoModelForImageTextToText.from_pretrained(**where),
        AutoProcessor.from_pretrained(**where),
    )
    message = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "red"}]}]
    text = processor.apply_chat_template(message, add_generation_prompt=True)
    with torch.no_grad():
        logits = model(**processor(text=text, images=images_of(directory, 1))).logits
    assert logits.isfinite().all()


def test_its_name_is_unknown_without_the_package(directory):
    done = python(
        "pretrain_laver.py", "--config", str(directory / "recipe.yaml"), "--vision", "dinov2-registers"
    )
    assert done.returncode == 2
    assert "vision='dinov2-registers' is not known; did you mean 'dinov2'?" in done.stderr
    assert done.stderr.count("\n") == 1
