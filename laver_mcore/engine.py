"""The objects of a run, wired once by `build` and handed to whoever works with them."""

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.optimizer.optimizer import MegatronOptimizer

from laver_mcore.config.schema import Config
from laver_mcore.model.inputs import AttentionGeometry
from laver_mcore.model.laver import LaverModel
from laver_mcore.model.parameters import unwrap
from laver_mcore.model.teacher import Teacher
from laver_mcore.parallel import Topology


@dataclass(frozen=True, kw_only=True)
class Network:
    """The model on this rank and what it was built from: all that a forward pass needs."""

    config: Config
    topology: Topology
    models: list[Any]
    """This rank's pipeline chunks; in Megatron's data-parallel wrapper while training."""
    geometry: AttentionGeometry
    vocab_size: int
    """Before padding."""

    @property
    def chunks(self) -> list[LaverModel]:
        """The chunks without a wrapper."""
        return [unwrap(model) for model in self.models]


@dataclass(frozen=True, kw_only=True)
class Engine(Network):
    """A network in training."""

    optimizer: MegatronOptimizer
    teacher: Teacher | None
    center_K: torch.Tensor
    """Running mean of the teacher's outputs on the last stage, zero while centring is off."""
