"""Every visual path has its three stages, and they say what they should."""

from dataclasses import replace
from pathlib import Path

import pytest

from laver_mcore.config.load import from_recipe, parse, resolve
from laver_mcore.model.parameters import training_of

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


# Recipe -> objective, factor of the vision tower's learning rate, of the pool's.
OTHERS = {
    "victor-qwen2.5-7b-siglip2/stage1": ("lm", 1.0, 1.0),
    "victor-qwen2.5-7b-siglip2/stage1.5": ("victor", 0.2, 15.0),
    "victor-qwen2.5-7b-siglip2/stage2": ("lm", 0.2, 1.0),
    "viral-qwen2.5-7b-clip/stage1": ("lm", 1.0, 1.0),
    "viral-qwen2.5-7b-clip/stage2": ("viral", 1.0, 1.0),
}


@pytest.mark.parametrize(("name", "wanted"), OTHERS.items(), ids=OTHERS)
def test_other_methods_recipes_say_what_their_papers_do(name, wanted):
    recipe = from_recipe(EXAMPLES / f"{name}.yaml")
    config = resolve(replace(recipe, run=replace(recipe.run, hf_path=None)))
    rate = training_of(config).rate
    assert (config.objective.name, rate("vision_encoder.tower.x"), rate("token_pool")) == wanted
    assert not config.attention.mixed_attention
    assert not config.attention.rope_2d
    assert config.vision.vision_layer == -2
    assert config.vision.normalize_visual_tokens == name.startswith("victor")


@pytest.mark.parametrize("objective", ["lm", "laver", "victor", "viral"])
def test_the_objective_alone_may_be_changed(objective):
    """One recipe, four methods: what differs is the objective, and the length of tokens that it wants."""
    argv = ["--config", str(EXAMPLES / "qwen2.5-7b-siglip2" / "stage2.yaml"), "--objective", objective]
    config, _ = parse([*argv, *(["--target-path", "models/dinov2-base"] if objective == "viral" else [])])
    plain, _ = parse([*argv[:2], "--objective", "lm"])
    same = replace(config, objective=plain.objective, train=plain.train)
    added = {weight.name for weight in config.objective.parameters(config)}
    assert config.train.trainable == (*plain.train.trainable, *config.train.trainable[2:])
    assert set(config.train.trainable[2:]) == added
    if objective == "victor":
        same = replace(same, vision=replace(same.vision, normalize_visual_tokens=False))
    assert same == plain
