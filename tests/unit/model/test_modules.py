"""The small modules by their formulas in fp64, and the spread of fresh weights."""

import math
from types import SimpleNamespace

import pytest
import torch

from laver_mcore.config.schema import ModelConfig
from laver_mcore.model.connector import Connector
from laver_mcore.model.initialize import draw
from laver_mcore.model.norm import RMSNorm
from laver_mcore.model.vision_encoders import PatchEmbedder
from laver_mcore.objectives.head import Head, head_weights


def gelu(x: torch.Tensor) -> torch.Tensor:
    """x Phi(x), not the tanh approximation."""
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2


def linear(x: torch.Tensor, layer: torch.nn.Linear) -> torch.Tensor:
    return x @ layer.weight.T + (0 if layer.bias is None else layer.bias)


KIND = dict(dtype=torch.float64, device=torch.device("cpu"))
MODULES = {
    "connector": (lambda: Connector(6, 10, 8, **KIND), 6, (True, True)),
    "vision_head": (
        lambda: Head((6, 10, 10, 6), torch.nn.GELU, last_bias=False, **KIND),
        6,
        (True, True, False),
    ),
    "patch_embedder": (lambda: PatchEmbedder(2, 10, 8, **KIND), 12, (True, True, True)),
}


@pytest.mark.parametrize("name", MODULES)
def test_mlp_is_its_formula(name):
    make, width, has_bias = MODULES[name]
    torch.manual_seed(0)
    module = make()
    layers = [layer for layer in module.layers if isinstance(layer, torch.nn.Linear)]
    assert tuple(layer.bias is not None for layer in layers) == has_bias
    x = torch.randn(5, width, dtype=torch.float64)
    wanted = linear(x, layers[0])
    for layer in layers[1:]:
        wanted = linear(gelu(wanted), layer)
    torch.testing.assert_close(module(x), wanted, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("epsilon", [1e-6, 1e-2])
def test_norm_is_its_formula(monkeypatch, epsilon):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: torch.device("cpu"))
    config = SimpleNamespace(params_dtype=torch.float64, sequence_parallel=True)
    norm = RMSNorm(config, 7, eps=epsilon)
    assert norm.weight.sequence_parallel, "its gradient would not be summed over tensor-parallel ranks"
    torch.manual_seed(0)
    norm.weight.data.uniform_(0.5, 2)
    x = 0.1 * torch.randn(4, 7, dtype=torch.float64)
    wanted = x / (x.square().mean(-1, keepdim=True) + epsilon).sqrt() * norm.weight
    torch.testing.assert_close(norm(x), wanted, rtol=1e-12, atol=1e-14)


SHAPE = ModelConfig(model="tiny", num_layers=8, init_method_std=0.02)
SPREADS = {
    "language_model.embedding.word_embeddings.weight": 0.02,
    "language_model.decoder.layers.3.self_attention.linear_qkv.weight": 0.02,
    "language_model.decoder.layers.3.mlp.linear_fc1.weight": 0.02,
    "language_model.decoder.layers.3.self_attention.linear_proj.weight": 0.02 / 4,  # sqrt(2 x 8 layers)
    "language_model.decoder.layers.3.mlp.linear_fc2.weight": 0.02 / 4,
    "connector.layers.0.weight": math.sqrt(2 / 400),  # Kaiming-normal: sqrt(2 / inputs)
    "vision_head.layers.2.weight": math.sqrt(2 / 400),
}


@pytest.mark.parametrize("name", SPREADS)
def test_spread_of_fresh_weights(name):
    added = {weight.name: weight.std for weight in head_weights("vision_head", (400, 400, 300))}
    drawn = draw(name, (300, 400), SHAPE, seed=1, std=added.get(name))
    # 120,000 numbers know their spread to 0.2 % and their mean to 0.3 % of it (one sigma).
    assert drawn.std().item() == pytest.approx(SPREADS[name], rel=0.01)
    assert abs(drawn.mean().item()) < 0.015 * SPREADS[name]
    assert torch.equal(drawn, draw(name, (300, 400), SHAPE, seed=1, std=added.get(name)))
    assert not torch.equal(drawn, draw(name, (300, 400), SHAPE, seed=2, std=added.get(name)))


def test_two_weights_of_one_shape_differ():
    name = "language_model.decoder.layers.{}.mlp.linear_fc2.weight"
    first, second = (draw(name.format(layer), (30, 40), SHAPE, seed=1) for layer in (0, 1))
    assert abs(torch.corrcoef(torch.stack([first.flatten(), second.flatten()]))[0, 1]) < 0.15


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("language_model.decoder.layers.0.input_layernorm.weight", 1.0),
        ("language_model.decoder.layers.0.mlp.linear_fc1.layer_norm_weight", 1.0),
        ("language_model.decoder.final_layernorm.weight", 1.0),
        ("language_model.decoder.layers.0.self_attention.linear_qkv.bias", 0.0),
        ("connector.layers.0.bias", 0.0),
    ],
)
def test_norms_are_one_and_biases_zero(name, value):
    assert torch.equal(draw(name, (6,), SHAPE, seed=1), torch.full((6,), value))
