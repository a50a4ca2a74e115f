"""Values at the bounds and just beyond; the default split of the rotary bands; ranks at the bounds of a recipe."""

import pytest

from laver_mcore.config.checks import check_world
from laver_mcore.config.errors import ConfigError
from laver_mcore.config.load import parse
from laver_mcore.config.presets import fill_from_preset
from laver_mcore.config.schema import ModelConfig
from laver_mcore.convert.hub.configuration_laver import LaverConfig as PublishedConfig

RECIPE = """
model: {model: tiny}
vision: {vision: encoder-free, image_size: 32, patch_size: 8}
data: {data_path: [x.json], tokenizer_model: t.model, seq_length: 128, pad_to_multiple: 16}
train: {objective: laver, train_iters: 10, global_batch_size: 8}
run: {save: runs/x}
"""
NATIVE = "--vision qwen2-vl --vision-path tower"

# Flag -> (value at the bound, value just beyond).
BOUNDS = {
    "--mask-ratio": ("0", "-0.01"),
    "--mask-ratio ": ("1", "1.01"),
    "--momentum": ("0", "-0.01"),
    "--momentum ": ("1", "1.01"),
    "--ema-ratio": ("1", "1.01"),
    "--center-momentum": ("1", "1.01"),
    "--student-temperature": ("0.001", "0"),
    "--teacher-temperature": ("0.001", "0"),
    "--ema-steps": ("1", "0"),
    "--min-relevance": ("1", "0"),
    "--min-relevance ": ("5", "6"),
    "--min-visual-dependency": ("5", "6"),
    "--min-image-correspondence": ("1", "0"),
    "--min-formatting": ("5", "6"),
    "--packing-window": ("1", "0"),
    "--worker-timeout": ("0.001", "0"),
    "--skip-to": ("0", "-1"),
    "--train-iters": ("1", "0"),
    "--micro-batch-size": ("1", "0"),
    "--global-batch-size": ("1", "0"),
    "--peak-tflops": ("0.001", "0"),
    "--attention-dropout": ("0", "0.001"),
    "--profile --profile-step-end 3 --profile-step-start": ("2", "3"),
    "--profile --profile-step-end 3 --profile-step-start ": ("1", "0"),
    f"{NATIVE} --min-pixels 784 --max-pixels": ("784", "783"),
    "--image-size": ("40", "39"),
    "--kv-channels 18 --mrope-section": ("1 3 5", "1 3 6"),
    "--kv-channels 18 --mrope-section ": ("1 3 5", "1 3 4"),
    "--tensor-model-parallel-size": ("2", "3"),
    "--tensor-model-parallel-size ": ("1", "0"),
    "--pipeline-model-parallel-size": ("4", "5"),
    "--pipeline-model-parallel-size ": ("1", "0"),
    "--context-parallel-size": ("4", "8"),
    "--context-parallel-size ": ("1", "0"),
    "--context-parallel-size 2 --pad-to-multiple": ("2", "3"),
    "--sequence-parallel --tensor-model-parallel-size": ("2", "1"),
    "--pipeline-model-parallel-size 2 --num-virtual-stages-per-pipeline-rank": ("2", "1"),
}


@pytest.fixture
def recipe(tmp_path):
    (tmp_path / "recipe.yaml").write_text(RECIPE, encoding="utf-8")
    return ["--config", str(tmp_path / "recipe.yaml")]


@pytest.mark.parametrize(("flag", "values"), BOUNDS.items(), ids=BOUNDS)
def test_bounds(flag, values, recipe):
    inside, beyond = values
    parse([*recipe, *flag.split(), *inside.split()])
    with pytest.raises(ConfigError):
        parse([*recipe, *flag.split(), *beyond.split()])


# Channels of a head -> bands of (t, row, column): none for t, the rest in halves, the odd one to the rows.
SECTIONS = {2: (0, 1, 0), 4: (0, 1, 1), 18: (0, 5, 4), 64: (0, 16, 16), 128: (0, 32, 32)}


@pytest.mark.parametrize(("channels", "section"), SECTIONS.items(), ids=map(str, SECTIONS))
def test_default_split_of_the_rotary_bands(channels, section):
    assert fill_from_preset(ModelConfig(model="tiny", kv_channels=channels)).mrope_section == section


def test_default_split_of_a_published_model():
    """A head of 128 channels, all that is published, where the file does not say."""
    assert PublishedConfig().mrope_section == [0, 32, 32]
    assert PublishedConfig().mrope_split == "contiguous"


@pytest.mark.parametrize(("model", "channels"), [("qwen2.5-0.5b", 64), ("qwen2.5-7b", 128)])
def test_channels_of_a_head_of_the_presets(model, channels):
    filled = fill_from_preset(ModelConfig(model=model))
    assert (filled.kv_channels, filled.mrope_section) == (channels, SECTIONS[channels])


# Ranks, flags -> data-parallel size; None: refused. 8 rows a step.
WORLDS = {
    "every rank a row": (8, "", 8),
    "more ranks than rows": (16, "", None),
    "two rows a rank": (4, "--micro-batch-size 2", 4),
    "rows left over": (3, "", None),
    "one replica": (8, "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 4", 1),
    "half a replica": (4, "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 4", None),
    "two replicas": (8, "--context-parallel-size 2 --pipeline-model-parallel-size 2", 2),
    "one group of micro-batches": (
        8,
        "--pipeline-model-parallel-size 2 --num-virtual-stages-per-pipeline-rank 2",
        4,
    ),
    "half a group of micro-batches": (
        16,
        "--pipeline-model-parallel-size 2 --num-virtual-stages-per-pipeline-rank 2",
        None,
    ),
}


@pytest.mark.parametrize(("ranks", "flags", "size"), WORLDS.values(), ids=WORLDS)
def test_ranks(ranks, flags, size, recipe):
    config, _ = parse([*recipe, *flags.split()])
    if size is None:
        with pytest.raises(ConfigError):
            check_world(config, ranks)
    else:
        assert check_world(config, ranks) == size
