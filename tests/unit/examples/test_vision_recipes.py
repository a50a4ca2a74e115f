"""Every visual path has its three stages, and they say what they should."""

from dataclasses import replace
from pathlib import Path

import pytest

from laver_mcore.config.load import from_recipe, resolve

EXAMPLES = Path(__file__).resolve().parents[3] / "examples"
FOLDERS = {
    "qwen2.5-7b-siglip2": "siglip",
    "qwen2.5-7b-clip": "clip",
    "qwen2.5-7b-dinov2": "dinov2",
    "qwen2.5-7b-aimv2": "aimv2",
    "qwen2.5-7b-qwen2.5-vit": "qwen2.5-vl",
    "qwen2.5-7b-encoder-free": "encoder-free",
}


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("folder", FOLDERS)
def test_recipe_resolves(folder, stage):
    recipe = from_recipe(EXAMPLES / folder / f"stage{stage}.yaml")
    config = resolve(replace(recipe, run=replace(recipe.run, hf_path=None)))  # the download is not here
    assert config.vision.vision == FOLDERS[folder]
    assert (config.objective.name == "laver") == (stage == 2)
    assert (recipe.run.hf_path is not None) == (stage == 1)
    assert config.attention.mixed_attention
    assert config.attention.rope_2d
