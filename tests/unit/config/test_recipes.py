"""Recipes: precedence, `base`, what --print-config writes, the examples, and the published sizes of the presets."""

from pathlib import Path

import pytest
import yaml

from laver_mcore.cli import train
from laver_mcore.config.checks import check_world
from laver_mcore.config.errors import ConfigError
from laver_mcore.config.load import from_recipe, parse, to_yaml
from laver_mcore.config.presets import PRESETS, fill_from_preset
from laver_mcore.config.schema import Config, ModelConfig

EXAMPLES = Path(__file__).resolve().parents[3] / "examples"
RECIPES = sorted(str(path.relative_to(EXAMPLES)) for path in EXAMPLES.glob("*/*.yaml"))
PARENT = """
model: {model: tiny, num_layers: 6}
vision: {vision: encoder-free, image_size: 32, patch_size: 8}
data: {data_path: [parent.json], tokenizer_model: tokenizer.model}
train: {train_iters: 10, global_batch_size: 4, trainable: ["connector.*"]}
"""
CHILD = """
base: parent.yaml
data: {data_path: [child.json, other.json]}
train: {train_iters: 20}
"""

# Flags -> (section, key, value) of the resolved recipe.
PRECEDENCE = {
    "default": ("", "optimizer", "adam_beta2", 0.999),
    "preset": ("", "model", "ffn_hidden_size", 384),
    "recipe_over_preset": ("", "model", "num_layers", 6),
    "child_over_base": ("", "train", "train_iters", 20),
    "base_where_the_child_is_silent": ("", "train", "global_batch_size", 4),
    "list_replaces_list": ("", "data", "data_path", ("child.json", "other.json")),
    "flag_over_recipe": ("--train-iters 30", "train", "train_iters", 30),
    "flag_over_recipe_over_preset": ("--num-layers 8", "model", "num_layers", 8),
    "underscores": ("--train_iters 30", "train", "train_iters", 30),
    "equals_sign": ("--train-iters=30", "train", "train_iters", 30),
    "flag_list_replaces_list": (
        "--trainable mask_token vision_head.*",
        "train",
        "trainable",
        ("mask_token", "vision_head.*"),
    ),
    "switch_on": ("--bf16", "train", "bf16", True),
    "switch_off": ("--no-mixed-attention", "attention", "mixed_attention", False),
    "last_flag_wins": ("--lr 1 --lr 2", "optimizer", "lr", 2.0),
    "preset_by_flag": ("--model qwen2.5-0.5b", "model", "hidden_size", 896),
    "head_width_follows": ("--hidden-size 256", "model", "kv_channels", 64),
    "rotary_sections_follow": ("--hidden-size 256", "model", "mrope_section", (0, 16, 16)),
}

# Shape fields of published config.json files: layers, width, MLP, heads, groups, vocabulary, tied.
SHAPES = {
    "qwen2.5-0.5b": (24, 896, 4864, 14, 2, 151936, True),
    "qwen2.5-1.5b": (28, 1536, 8960, 12, 2, 151936, True),
    "qwen2.5-3b": (36, 2048, 11008, 16, 2, 151936, True),
    "qwen2.5-7b": (28, 3584, 18944, 28, 4, 152064, False),
    "qwen2.5-14b": (48, 5120, 13824, 40, 8, 152064, False),
    "qwen2.5-32b": (64, 5120, 27648, 40, 8, 152064, False),
    "qwen2.5-72b": (80, 8192, 29568, 64, 8, 152064, False),
    "qwen3-0.6b": (28, 1024, 3072, 16, 8, 151936, True),
    "qwen3-1.7b": (28, 2048, 6144, 16, 8, 151936, True),
    "qwen3-4b": (36, 2560, 9728, 32, 8, 151936, True),
    "qwen3-8b": (36, 4096, 12288, 32, 8, 151936, False),
    "qwen3-14b": (40, 5120, 17408, 40, 8, 151936, False),
    "qwen3-32b": (64, 5120, 25600, 64, 8, 151936, False),
    "llama2-7b": (32, 4096, 11008, 32, 32, 32000, False),
    "llama2-13b": (40, 5120, 13824, 40, 40, 32000, False),
    "vicuna-7b": (32, 4096, 11008, 32, 32, 32000, False),
    "vicuna-13b": (40, 5120, 13824, 40, 40, 32000, False),
    "llama3-8b": (32, 4096, 14336, 32, 8, 128256, False),
    "llama3.1-8b": (32, 4096, 14336, 32, 8, 128256, False),
}
# Beginning of a preset's name -> family, rotary base, epsilon of the norms.
FAMILY = {
    "qwen2.5": ("qwen2", 1e6, 1e-6),
    "qwen3": ("qwen3", 1e6, 1e-6),
    "llama2": ("llama", 1e4, 1e-5),
    "vicuna": ("llama", 1e4, 1e-5),
    "llama3": ("llama", 5e5, 1e-5),
}

# Ranks, flags -> data-parallel size, or words of the refusal.
WORLDS = {
    "one": (1, "", 1),
    "data_parallel": (4, "", 4),
    "tensor_parallel": (4, "--tensor-model-parallel-size 2", 2),
    "context_parallel": (8, "--tensor-model-parallel-size 2 --context-parallel-size 2", 2),
    "does_not_divide": (3, "--tensor-model-parallel-size 2", "world size 3 is not divisible by"),
    "batch_does_not_divide": (
        8,
        "",
        "global_batch_size=4 is not divisible by micro_batch_size x data-parallel",
    ),
    "interleaved_needs_even_micro_batches": (
        4,
        "--pipeline-model-parallel-size 2 --num-virtual-stages-per-pipeline-rank 3 --global-batch-size 6",
        "needs a number of micro-batches divisible by pipeline_model_parallel_size=2, got 3",
    ),
}


@pytest.fixture
def child(tmp_path):
    (tmp_path / "parent.yaml").write_text(PARENT, encoding="utf-8")
    (tmp_path / "child.yaml").write_text(CHILD, encoding="utf-8")
    return tmp_path / "child.yaml"


@pytest.mark.parametrize(("flags", "section", "key", "wanted"), PRECEDENCE.values(), ids=PRECEDENCE)
def test_precedence(child, flags, section, key, wanted):
    config, _ = parse(["--config", str(child), *flags.split()])
    assert getattr(getattr(config, section), key) == wanted


def test_base_may_stand_in_another_folder(child, tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "leaf.yaml").write_text("base: ../child.yaml\ntrain: {seed: 7}\n", encoding="utf-8")
    config, _ = parse(["--config", str(tmp_path / "sub" / "leaf.yaml")])
    assert (config.train.seed, config.train.train_iters, config.model.num_layers) == (7, 20, 6)


@pytest.mark.parametrize("flags", ["", "--lr 3.3e-05 --model qwen2.5-0.5b --num-layers 12 --save runs/x"])
def test_print_config_reads_back(child, tmp_path, capsys, flags):
    argv = ["--config", str(child), *flags.split()]
    assert train.main([*argv, "--print-config"]) == 0
    printed = capsys.readouterr().out
    (tmp_path / "printed.yaml").write_text(printed, encoding="utf-8")
    wanted, _ = parse(argv)
    again, _ = parse(["--config", str(tmp_path / "printed.yaml")])
    assert again == wanted
    assert to_yaml(again) == printed
    assert not (tmp_path / "runs").exists()


# A recipe's model section, flags -> the split of the rotary bands.
SPLITS = {
    "by_default": ("{model: tiny}", "", "interleaved"),
    "section_by_flag": ("{model: tiny}", "--mrope-section 4 6 6", "interleaved"),
    "of_an_older_run": ("{model: tiny, mrope_section: [0, 8, 8]}", "", "contiguous"),
    "of_a_run_of_today": (
        "{model: tiny, mrope_section: [0, 8, 8], mrope_split: interleaved}",
        "",
        "interleaved",
    ),
    "flag_over_an_older_run": (
        "{model: tiny, mrope_section: [0, 8, 8]}",
        "--mrope-split interleaved",
        "interleaved",
    ),
}


@pytest.mark.parametrize(("model", "flags", "wanted"), SPLITS.values(), ids=SPLITS)
def test_split_of_the_rotary_bands(child, tmp_path, model, flags, wanted):
    (tmp_path / "leaf.yaml").write_text(f"base: child.yaml\nmodel: {model}\n", encoding="utf-8")
    config, _ = parse(["--config", str(tmp_path / "leaf.yaml"), *flags.split()])
    assert config.model.mrope_split == wanted


def test_help_names_every_flag(capsys):
    with pytest.raises(SystemExit) as exit_:
        train.main(["--help"])
    assert exit_.value.code == 0
    text = capsys.readouterr().out
    for section in yaml.safe_load(to_yaml(Config())).values():
        for key in section:
            assert f"--{key.replace('_', '-')}" in text, key


@pytest.mark.parametrize("recipe", RECIPES)
def test_example_loads(recipe):
    assert isinstance(from_recipe(EXAMPLES / recipe), Config)


def test_examples_are_there():
    assert {"demo/stage1.yaml", "demo/stage2.yaml", "demo/stage3.yaml"} <= set(RECIPES)
    assert {f"qwen2.5-7b-siglip2/stage{stage}.yaml" for stage in (1, 2, 3)} <= set(RECIPES)


@pytest.mark.parametrize("name", SHAPES)
def test_preset_has_the_published_shape(name):
    filled = fill_from_preset(ModelConfig(model=name))
    names = (
        "num_layers",
        "hidden_size",
        "ffn_hidden_size",
        "num_attention_heads",
        "num_query_groups",
        "vocab_size",
    )
    assert (*(getattr(filled, n) for n in names), not filled.untie_embeddings_and_output_weights) == SHAPES[
        name
    ]
    family, base, epsilon = next(known for start, known in FAMILY.items() if name.startswith(start))
    assert (filled.family, filled.rotary_base, filled.norm_epsilon) == (family, base, epsilon)
    assert filled.kv_channels == (64 if name == "qwen2.5-0.5b" else 128)
    assert filled.rope_scaling == ((8.0, 1.0, 4.0, 8192) if name == "llama3.1-8b" else None)
    assert set(SHAPES) | {"tiny"} == set(PRESETS)


@pytest.mark.parametrize(("ranks", "flags", "wanted"), WORLDS.values(), ids=WORLDS)
def test_world(child, ranks, flags, wanted):
    config, _ = parse(["--config", str(child), *flags.split()])
    if isinstance(wanted, int):
        assert check_world(config, ranks) == wanted
    else:
        with pytest.raises(ConfigError, match=wanted):
            check_world(config, ranks)
