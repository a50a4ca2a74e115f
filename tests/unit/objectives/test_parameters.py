"""What an objective says that it adds is what it adds, name by name and shape by shape."""

import pytest
import torch

from laver_mcore.config.objectives import load_objective
from laver_mcore.config.schema import Config, ModelConfig
from laver_mcore.objectives.laver import LaverConfig
from laver_mcore.objectives.victor import VictorConfig
from laver_mcore.objectives.viral import ViralConfig

# Settings -> parameters on the first stage, on the last, as the papers have them.
MLP = ["layers.0.weight", "layers.0.bias", "layers.2.weight", "layers.2.bias", "layers.4.weight"]
CASES = {
    "laver": (LaverConfig(), ["mask_token"], [f"vision_head.{name}" for name in MLP]),
    "victor": (
        VictorConfig(),
        ["token_pool"],
        ["reconstruction_head.layers.0.weight", "reconstruction_head.layers.0.bias"],
    ),
    "viral": (
        ViralConfig(target_layers=(2, 4)),
        [],
        [f"projector.{name}" for name in (*MLP, "layers.4.bias")],
    ),
    "viral_own": (
        ViralConfig(target_layers=(2, 4), shared_projector=False),
        [],
        [f"projector_{layer}.{name}" for layer in (2, 4) for name in (*MLP, "layers.4.bias")],
    ),
}


def shapes(modules) -> dict[str, tuple[int, ...]]:
    found = {}
    for name, item in modules.items():
        own = {name: item} if isinstance(item, torch.nn.Parameter) else None
        for key, parameter in (own or {f"{name}.{k}": p for k, p in item.named_parameters()}).items():
            found[key] = tuple(parameter.shape)
    return found


@pytest.mark.parametrize(("settings", "first", "last"), CASES.values(), ids=CASES)
def test_parameters_are_those_that_are_listed(settings, first, last):
    config = Config(model=ModelConfig(hidden_size=24, num_layers=6), objective=settings)
    listed = settings.parameters(config)
    for place, names in (("first", first), ("last", last)):
        modules = load_objective(settings.name).modules(config, place, dtype=torch.float32, device="meta")
        real = shapes(modules)
        assert sorted(real) == sorted(names)
        assert real == {weight.name: weight.shape for weight in listed if weight.place == place}
