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
    "qwen3-8b-siglip2": "siglip",
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
    "victor-vicuna-7b-clip/stage1": ("lm", 1.0, 1.0),
    "victor-vicuna-7b-clip/stage1.5": ("victor", 0.2, 100.0),
    "victor-vicuna-7b-clip/stage2": ("lm", 0.2, 1.0),
    "victor-llama3.1-8b-siglip2/stage1": ("lm", 1.0, 1.0),
    "victor-llama3.1-8b-siglip2/stage1.5": ("victor", 0.2, 15.0),
    "victor-llama3.1-8b-siglip2/stage2": ("lm", 0.2, 1.0),
    "viral-vicuna-7b-clip/stage1": ("lm", 1.0, 1.0),
    "viral-vicuna-7b-clip/stage2": ("viral", 1.0, 1.0),
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


DECODERS = {"qwen3-8b": "qwen3", "vicuna-7b": "llama", "llama3.1-8b": "llama", "qwen2.5-7b": "qwen2"}


@pytest.mark.parametrize(
    "recipe", sorted(EXAMPLES.glob("*-?b-*/stage*.yaml")), ids=lambda p: f"{p.parent.name}/{p.stem}"
)
def test_recipes_have_the_decoder_in_their_name(recipe):
    found = from_recipe(recipe)
    config = resolve(replace(found, run=replace(found.run, hf_path=None)))
    (preset,) = [name for name in DECODERS if name in recipe.parent.name]
    assert (config.model.model, config.model.family) == (preset, DECODERS[preset])
    published = {
        "vicuna-7b": "vicuna-7b-v1.5",
        "llama3.1-8b": "Llama-3.1-8B-Instruct",
        "qwen3-8b": "Qwen3-8B",
    }
    assert found.data.tokenizer_model == f"models/{published.get(preset, 'Qwen2.5-7B-Instruct')}"
    assert found.run.hf_path in (None, found.data.tokenizer_model)
    assert (config.data.chat_template == "vicuna") == (preset == "vicuna-7b")


def test_viral_on_vicuna_trains_adapters_at_the_papers_rates():
    recipe = from_recipe(EXAMPLES / "viral-vicuna-7b-clip" / "stage2.yaml")
    config = resolve(recipe)
    assert (config.model.lora_rank, config.model.lora_alpha, len(config.model.adapted_layers)) == (
        128,
        256.0,
        4,
    )
    training = training_of(config)
    adapter = "language_model.decoder.layers.3.mlp.linear_fc1.lora_b"
    assert config.optimizer.lr * training.rate(adapter) == pytest.approx(2e-4)
    assert config.optimizer.lr * training.rate("connector.layers.0.weight") == pytest.approx(2e-5)


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
