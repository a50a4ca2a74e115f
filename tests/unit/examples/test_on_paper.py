"""`--dry-run` of the shipped recipes on a laptop: nothing is downloaded, and what is missing comes with its command."""

from pathlib import Path

import pytest

from laver_mcore.cli.assets import MODELS, how_to_get, missing
from laver_mcore.cli.dry_run import dry_run
from laver_mcore.config.errors import ConfigError
from laver_mcore.config.load import parse
from laver_mcore.shapes.weights import list_weights

EXAMPLES = Path(__file__).resolve().parents[3] / "examples"
RECIPES = sorted(path for path in EXAMPLES.glob("*/stage*.yaml") if path.parent.name != "demo")


@pytest.fixture(autouse=True)
def nothing_is_here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    "recipe", [r for r in RECIPES if r.stem == "stage2"], ids=lambda path: f"{path.parent.name}/{path.stem}"
)
def test_a_recipe_is_described_without_its_files(recipe, capsys):
    argv = ["--config", str(recipe), "--dry-run"]
    config, _ = parse(argv)
    assert dry_run(config) == 0
    said = capsys.readouterr().out
    total = sum(weight.size for weight in list_weights(config, config.model.vocab_size))
    assert f"{config.model.model}: {total:,} parameters" in said
    assert "GiB per rank" in said
    for path, flags in missing(config).items():
        assert f"  {path} (--{flags[0].replace('_', '-')}" in said


def test_every_model_that_a_recipe_names_has_its_command():
    named = set()
    for recipe in RECIPES:
        named |= {
            p for p in missing(parse(["--config", str(recipe), "--dry-run"])[0]) if p.startswith("models/")
        }
    assert len(named) >= 9
    for path in named:
        assert how_to_get(path) == f"hf download {MODELS[Path(path).name]} --local-dir {path}"


def test_a_run_without_its_weights_is_refused_all_the_same():
    with pytest.raises(ConfigError, match=r"models/Qwen2.5-7B-Instruct/config.json: no such file"):
        parse(["--config", str(EXAMPLES / "qwen2.5-7b-siglip2" / "stage1.yaml")])


def test_data_of_ones_own_have_no_command():
    assert how_to_get("mine/records.json") == "yours to give"
    assert how_to_get("data/FineVision/sample-800k").endswith("docs/data.md makes sample-800k of it")


def test_where_everything_is_here_there_is_nothing_to_fetch(tmp_path):
    config, _ = parse(["--config", str(RECIPES[0]), "--dry-run"])
    for path in missing(config):
        (tmp_path / path).mkdir(parents=True)
    assert missing(config) == {}
