"""What a recipe says about data reaches the data engine."""

import json
from dataclasses import replace

import pytest
from corpora import write_finevision
from sample_run import write_recipe, write_sample_data

from laver_mcore.build import build_data, build_tokenizer
from laver_mcore.checkpoint import Progress
from laver_mcore.config.checks import ConfigError
from laver_mcore.config.load import parse
from laver_mcore.data.native import native_processor
from laver_mcore.data.pixel_settings import smart_resize
from laver_mcore.run import skip_ahead


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
    return build_data(config, build_tokenizer(config))


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


@pytest.mark.parametrize("bounds", [(None, None), (28 * 28, 40_000), (None, 40_000), (300_000, None)])
def test_pixel_bounds_of_native_resolution(bounds, tmp_path):
    given = {"image_processor_type": "Qwen2VLImageProcessor", "patch_size": 14, "min_pixels": 3136}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(given | {"max_pixels": 1_000_000}))
    ours = native_processor("qwen2-vl", tmp_path, min_pixels=bounds[0], max_pixels=bounds[1])
    low, high = bounds[0] or 3136, bounds[1] or 1_000_000
    for width, height in ((640, 480), (61, 45), (2000, 1500)):
        rows, columns = smart_resize(width, height, 28, low, high)
        assert ours.grid(width, height) == (rows // 28, columns // 28)
    assert (ours.settings.min_pixels, ours.settings.max_pixels) == (low, high)


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
    with pytest.raises(ConfigError, match="skip_to=7 lies behind step 8"):
        skip_ahead(Progress(iteration=8, consumed_rows=32), config)
    stays = replace(config, run=replace(config.run, skip_to=None))
    assert skip_ahead(Progress(iteration=8, consumed_rows=32), stays).consumed_rows == 32
