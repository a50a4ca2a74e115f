"""What a recipe says about data reaches the data engine."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from corpora import write_finevision
from sample_run import write_recipe, write_sample_data

from laver_mcore.cli.run import passes, skip_ahead
from laver_mcore.config.errors import ConfigError
from laver_mcore.config.load import parse
from laver_mcore.config.schema import TrainConfig
from laver_mcore.data.images.native import native_processor
from laver_mcore.data.records.finevision import RatingFilter
from laver_mcore.train import build
from laver_mcore.train.checkpoint import Progress


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recipe")
    write_sample_data(folder)
    write_recipe(folder)
    return folder


def config_of(folder, *argv):
    return parse(["--config", str(folder / "recipe.yaml"), *argv])[0]


def data_of(folder, *argv):
    config = config_of(folder, *argv)
    return build.build_data(config, build.build_tokenizer(config))


@pytest.mark.parametrize(("rating", "num_turns"), [(None, 18), (3, 14), (5, 10)])
def test_ratings(rating, num_turns, folder, tmp_path):
    """The second question of row n is rated n % 5 + 1, the first ones are rated 5 (`corpora.py`)."""
    pytest.importorskip("pyarrow")
    path = write_finevision(tmp_path / "rows.parquet")
    more = () if rating is None else ("--min-relevance", str(rating))
    data = data_of(folder, "--data-path", str(path), "--seq-length", "1024", *more)
    answers = [
        turn for n in range(len(data.samples)) for turn in data.samples[n].turns if turn.role == "assistant"
    ]
    assert len(answers) == num_turns


def test_packing_window_and_cost_change_the_rows(folder):
    plain, other = data_of(folder), data_of(folder, "--packing-window", "8")
    assert plain.fingerprint() != other.fingerprint()
    rows = [data.row(row) for data in (plain, other) for row in range(4)]
    assert rows[:4] != rows[4:]
    costs = {plain.row_cost(row) for row in range(8)}
    assert len(costs) > 1 and min(costs) > 128  # a row's tokens, and what its dialogues add


def test_without_packing_a_row_is_a_dialogue(folder):
    """So a step of four rows is four dialogues, and each is seen once in an epoch."""
    data = data_of(folder, "--no-packing")
    rows = [data.row(row) for row in range(data.rows_per_epoch(0))]
    assert data.rows_per_epoch(0) == data.samples_per_epoch(0) == len(data.samples)
    assert all(len(row) == 1 for row in rows) and len({row[0] for row in rows}) == len(rows)
    packed = data_of(folder)
    assert packed.rows_per_epoch(0) < packed.samples_per_epoch(0) == len(packed.samples)
    four = TrainConfig(global_batch_size=4, train_iters=len(rows))
    assert passes(four, data) == "about 4 dialogues a step, 4.00 epochs in all"
    rate = 4 * len(rows) / packed.rows_per_epoch(0)
    assert passes(four, packed) == f"about {rate:.0f} dialogues a step, {rate:.2f} epochs in all"


@pytest.mark.parametrize("bounds", [(None, None), (28 * 28, 40_000), (None, 40_000), (300_000, None)])
def test_pixel_bounds_of_native_resolution(bounds, tmp_path):
    given = {"image_processor_type": "Qwen2VLImageProcessor", "patch_size": 14, "min_pixels": 3136}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(given | {"max_pixels": 1_000_000}))
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

    ours = native_processor("qwen", tmp_path, min_pixels=bounds[0], max_pixels=bounds[1])
    low, high = bounds[0] or 3136, bounds[1] or 1_000_000
    for width, height in ((640, 480), (61, 45), (2000, 1500)):
        rows, columns = smart_resize(height, width, 28, low, high)
        assert ours.grid(width, height) == (rows // 28, columns // 28)
    assert (ours.settings.min_pixels, ours.settings.max_pixels) == (low, high)


# Flags -> (argument of the data engine, its value).
WIRING = {
    "--seq-length 96": ("seq_length", 96),
    "--seed 5": ("seed", 5),
    "--overlong truncate": ("overlong", "truncate"),
    "--packing-window 8": ("packing_window", 8),
    "--num-workers 3": ("num_workers", 3),
    "--worker-timeout 7": ("worker_timeout", 7.0),
    "--decode-threads 5": ("decode_threads", 5),
    "--max-bad-fraction 0.25": ("max_bad_fraction", 0.25),
    "--image-backend torch_uint8": ("image_backend", "torch_uint8"),
    "--image-folder pictures": ("image_folder", "pictures"),
    "--allow-outside-images": ("allow_outside_images", True),
    "--index-folder indexes": ("index_folder", Path("indexes")),
    "--system-prompt Hello.": ("system_prompt", "Hello."),
    "--save runs/x": ("quarantine", Path("runs/x/quarantine.jsonl")),
    "--data-weights 0.5": ("weights", (0.5,)),
    "--min-relevance 2": ("ratings", RatingFilter(relevance=2)),
    "--min-visual-dependency 3": ("ratings", RatingFilter(visual_dependency=3)),
    "--min-image-correspondence 4": ("ratings", RatingFilter(image_correspondence=4)),
    "--min-formatting 5": ("ratings", RatingFilter(formatting=5)),
}


@pytest.mark.parametrize(("flags", "wanted"), WIRING.items(), ids=WIRING)
def test_a_flag_reaches_its_argument_and_no_other(flags, wanted, folder, monkeypatch):
    given = []
    monkeypatch.setattr(build, "DialogueData", lambda paths, **settings: given.append(settings))
    data_of(folder)
    data_of(folder, *flags.split())
    plain, changed = ({**settings, "tokenizer": None} for settings in given)
    plain.pop("cost"), changed.pop("cost")  # that of another length is another
    name, value = wanted
    assert changed[name] == value != plain[name]
    assert plain | {name: value} == changed


PATHS = {
    "encoder-free": ("--image-size 48 --patch-size 12", {"image_size": 48, "patch_size": 12}),
    "lower bound": ("--vision qwen2-vl --vision-path {d} --min-pixels 784", {"min_pixels": 784}),
    "upper bound": ("--vision qwen2-vl --vision-path {d} --max-pixels 9408", {"max_pixels": 9408}),
}


@pytest.mark.parametrize(("flags", "wanted"), PATHS.values(), ids=PATHS)
def test_what_the_image_processor_is_built_from(flags, wanted, folder, tmp_path):
    given = {"image_processor_type": "Qwen2VLImageProcessor", "min_pixels": 3136, "max_pixels": 1_000_000}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(given))
    processor = build.build_image_processor(config_of(folder, *flags.format(d=tmp_path).split()))
    settings = processor if flags.startswith("--image") else processor.settings
    assert {name: getattr(settings, name) for name in wanted} == wanted
    if settings is not processor:
        other = {"min_pixels", "max_pixels"} - wanted.keys()
        assert {name: getattr(settings, name) for name in other} == {name: given[name] for name in other}


def test_several_sets_keep_their_order(folder, monkeypatch):
    given = []
    monkeypatch.setattr(build, "DialogueData", lambda paths, **settings: given.append((paths, settings)))
    data_of(folder, "--data-path", "b.json", "a.json", "--data-weights", "2", "0.5")
    ((paths, settings),) = given
    assert (paths, settings["weights"]) == (["b.json", "a.json"], (2.0, 0.5))


BAD = {
    "rating": (("--min-formatting", "6"), "min_formatting=6 is no rating"),
    "window": (("--packing-window", "0"), "packing_window=0 must be at least 1"),
    "timeout": (("--worker-timeout", "0"), "worker_timeout=0.0 must be positive"),
    "fixed": (("--max-pixels", "100"), "vision=encoder-free has a fixed one"),
    "skip": (("--skip-to", "-1"), "skip_to=-1 must not be negative"),
}


@pytest.mark.parametrize(("argv", "message"), BAD.values(), ids=BAD.keys())
def test_bad_values(argv, message, folder):
    with pytest.raises(ConfigError, match=message):
        config_of(folder, *argv)


def test_skip_to_moves_the_data_alone(folder):
    config = config_of(folder, "--skip-to", "7", "--global-batch-size", "4")
    assert skip_ahead(Progress(iteration=3, consumed_rows=12), config) == Progress(
        iteration=3, consumed_rows=28
    )
    assert skip_ahead(Progress(iteration=7, consumed_rows=28), config).consumed_rows == 28  # where it stands
    with pytest.raises(ConfigError, match="skip_to=7 lies behind step 8"):
        skip_ahead(Progress(iteration=8, consumed_rows=32), config)
    stays = replace(config, run=replace(config.run, skip_to=None))
    assert skip_ahead(Progress(iteration=8, consumed_rows=32), stays).consumed_rows == 32
