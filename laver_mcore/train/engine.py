"""The objects of a run, wired once by `build` and handed to whoever works with them."""

from dataclasses import dataclass

import torch
from megatron.core.optimizer.optimizer import MegatronOptimizer

from laver_mcore.model.network import Network
from laver_mcore.model.teacher import Teacher


@dataclass(frozen=True, kw_only=True)
class Engine(Network):
    """A network in training."""

    optimizer: MegatronOptimizer
    teacher: Teacher | None
    center_K: torch.Tensor
    """Running mean of the teacher's outputs on the last stage, zero while centring is off."""
