"""Objectives by name, and older recipes' keys: each taken at its new place, and said so in one line."""

import pytest

from laver_mcore.config.errors import ConfigError
from laver_mcore.config.load import parse, read_recipe
from laver_mcore.config.objectives import objective_spec, reconstructs

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
        ("train", "objective", "laver"),
        "laver.laver is now train.objective: laver",
    ),
    "laver_off": (
        "laver: {laver: false}",
        ("train", "objective", "lm"),
        "laver.laver is now train.objective: lm",
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
    assert found[section][key] == value
    assert line in capsys.readouterr().err


def test_only_rank_0_says_so(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    (tmp_path / "old.yaml").write_text("laver: {laver: true}", encoding="utf-8")
    assert read_recipe(tmp_path / "old.yaml")["train"]["objective"] == "laver"
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
    assert config.train.objective == name
    assert reconstructs(config) == again


def test_unknown_objective_names_the_nearest(recipe):
    with pytest.raises(
        ConfigError, match=r"objective='lavr' is not known; did you mean 'laver'\? \(lm, laver"
    ):
        parse(["--config", str(recipe), "--objective", "lavr"])
    with pytest.raises(ConfigError, match="is not known"):
        objective_spec("")
