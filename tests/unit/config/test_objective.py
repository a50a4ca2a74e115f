"""Objectives by name, and older recipes' keys: each taken at its new place, and said so in one line."""

import pytest

from laver_mcore.config.errors import ConfigError
from laver_mcore.config.load import parse, read_recipe, to_yaml
from laver_mcore.config.objectives import load_objective
from laver_mcore.config.schema import ObjectiveConfig

RECIPE = """
model: {model: tiny}
vision: {vision: encoder-free, image_size: 32, patch_size: 8}
data: {data_path: [x.json], tokenizer_model: t.model, seq_length: 128, pad_to_multiple: 16}
train: {train_iters: 10, global_batch_size: 8}
"""

# Section and key of an older recipe -> where its value stands now, and in what words.
MOVED = {
    "laver_on": (
        "laver: {laver: true}",
        ("objective", None, "laver"),
        "laver.laver is now objective: laver",
    ),
    "laver_off": (
        "laver: {laver: false}",
        ("objective", None, "lm"),
        "laver.laver is now objective: lm",
    ),
    "in_train": (
        "train: {objective: laver}",
        ("objective", None, "laver"),
        "train.objective is now objective: laver",
    ),
    "attention": (
        "laver: {mixed_attention: false}",
        ("attention", "mixed_attention", False),
        "laver.mixed_attention is now attention.mixed_attention: False",
    ),
    "positions": (
        "laver: {rope_2d: false, mask_ratio: 0.5}",
        ("attention", "rope_2d", False),
        "laver.rope_2d is now attention.rope_2d: False",
    ),
    "both": (
        "laver: {rope_2d: false}\nattention: {rope_2d: true}",
        ("attention", "rope_2d", True),
        "laver.rope_2d is now attention.rope_2d: False",
    ),
}


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE, encoding="utf-8")
    return path


@pytest.mark.parametrize(("old", "place", "line"), MOVED.values(), ids=MOVED)
def test_older_key_is_taken_and_named(tmp_path, capsys, monkeypatch, old, place, line):
    monkeypatch.delenv("RANK", raising=False)
    path = tmp_path / "old.yaml"
    path.write_text(old, encoding="utf-8")
    section, key, value = place
    found = read_recipe(path)
    assert (found[section] if key is None else found[section][key]) == value
    assert line in capsys.readouterr().err


def test_only_rank_0_says_so(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    (tmp_path / "old.yaml").write_text("laver: {laver: true}", encoding="utf-8")
    assert read_recipe(tmp_path / "old.yaml")["objective"] == "laver"
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("flag", "now"), [("--laver", "--objective laver"), ("--no-laver", "--objective lm")]
)
def test_older_flag_names_the_new_one(recipe, flag, now):
    with pytest.raises(ConfigError, match=f"^{flag} is now {now}$"):
        parse(["--config", str(recipe), flag])


@pytest.mark.parametrize(("name", "again"), [("lm", False), ("laver", True)])
def test_what_an_objective_makes_of_the_model(recipe, name, again):
    config, _ = parse(["--config", str(recipe), "--objective", name])
    assert config.objective.name == name
    assert config.objective.reconstructs == again
    assert (config.objective.teacher(config) is not None) == again
    assert [weight.name for weight in config.objective.parameters(config)][:1] == ["mask_token"] * again


def test_an_objectives_settings_stand_in_its_section(recipe):
    """The recipe keeps the sections of other objectives; flags are those of the one that is chosen."""
    recipe.write_text(
        RECIPE + "objective: laver\nlaver: {mask_ratio: 0.25, ema_steps: 3}\n", encoding="utf-8"
    )
    config, _ = parse(["--config", str(recipe), "--mask-ratio", "0.5"])
    assert (config.objective.mask_ratio, config.objective.ema_steps) == (0.5, 3)
    recipe.with_name("again.yaml").write_text(to_yaml(config), encoding="utf-8")
    assert parse(["--config", str(recipe.with_name("again.yaml"))])[0] == config
    config, _ = parse(["--config", str(recipe), "--objective", "lm"])
    assert config.objective == ObjectiveConfig()
    with pytest.raises(
        ConfigError, match=r"^--mask-ratio is a setting of objective laver, and this run's is lm$"
    ):
        parse(["--config", str(recipe), "--objective", "lm", "--mask-ratio", "0.5"])


# A recipe's lines -> what is said.
REFUSED = {
    "key": ("laver: {mask_ration: 0.5}", "unknown key laver.mask_ration; did you mean 'mask_ratio'"),
    "value": ("laver: {ema_steps: many}", "laver.ema_steps='many': input should be a valid integer"),
    "no_settings": ("lm: {mask_ratio: 0.5}", "unknown key lm.mask_ratio, which has none"),
    "section": ("lavr: {mask_ratio: 0.5}", "unknown section 'lavr'; did you mean 'laver'"),
    "name": ("objective: lavr", "objective='lavr' is not known; did you mean 'laver'"),
}


@pytest.mark.parametrize(("line", "message"), REFUSED.values(), ids=REFUSED)
def test_wrong_settings_are_named_whatever_the_objective(recipe, line, message):
    recipe.write_text(RECIPE + line + "\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=message):
        parse(["--config", str(recipe)])


def test_unknown_objective_names_the_nearest(recipe):
    with pytest.raises(
        ConfigError, match=r"objective='lavr' is not known; did you mean 'laver'\? \(lm, laver"
    ):
        parse(["--config", str(recipe), "--objective", "lavr"])
    with pytest.raises(ConfigError, match="is not known"):
        load_objective("")


HEAD = ("reconstruction_head.layers.0.weight", "reconstruction_head.layers.0.bias")
# Objective, --trainable -> the patterns that are left.
TRAINABLE = {
    "own": ("victor", "connector.* objective", ("connector.*", "token_pool", *HEAD)),
    "none_to_add": ("lm", "connector.* objective", ("connector.*",)),
    "another_objectives": ("lm", "connector.* mask_token vision_head.*", ("connector.*",)),
    "ones_own_by_name": ("laver", "connector.* mask_token token_pool", ("connector.*", "mask_token")),
    "all": ("lm", "*", ("*",)),
    "unknown_names_are_left_to_the_model": ("lm", "conector.*", ("conector.*",)),
}


@pytest.mark.parametrize(("objective", "patterns", "wanted"), TRAINABLE.values(), ids=TRAINABLE)
def test_what_trains_follows_the_objective(recipe, objective, patterns, wanted):
    argv = ["--config", str(recipe), "--objective", objective, "--trainable", *patterns.split()]
    assert parse(argv)[0].train.trainable == wanted


def test_patterns_of_parts_that_the_visual_path_does_without_are_no_error():
    patterns = ["--trainable", "vision_encoder.*", "connector.*", "language_model.*"]
    base = [
        "--model",
        "tiny",
        "--objective",
        "lm",
        "--data-path",
        "none",
        "--tokenizer-model",
        "none",
        *patterns,
    ]
    free = parse([*base, "--vision", "encoder-free"])[0]
    assert free.train.trainable == ("connector.*", "language_model.*")
    assert parse([*base, "--vision", "none"])[0].train.trainable == ("language_model.*",)
    whole = parse([*base, "--vision", "siglip", "--vision-path", "tower"])[0]
    assert whole.train.trainable == tuple(patterns[1:])
