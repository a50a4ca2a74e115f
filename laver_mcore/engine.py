"""The objects of a run, wired once by `build` and handed to whoever works with them."""

from dataclasses import dataclass

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer.optimizer import MegatronOptimizer

from laver_mcore.config.schema import Config
from laver_mcore.model.inputs import AttentionGeometry
from laver_mcore.model.laver import LaverModel
from laver_mcore.model.parameters import unwrap
from laver_mcore.model.teacher import Teacher
from laver_mcore.parallel import Topology


@dataclass(frozen=True, kw_only=True)
class Engine:
    """Model, optimizer and teacher of this rank, and what they were built from."""

    config: Config
    topology: Topology
    models: list[DistributedDataParallel]
    optimizer: MegatronOptimizer
    teacher: Teacher | None
    center_K: torch.Tensor
    """Running mean of the teacher's outputs, zero where centring is off; kept in step on every rank that uses it."""
    geometry: AttentionGeometry
    vocab_size: int

    @property
    def chunks(self) -> list[LaverModel]:
        """The models without Megatron's data-parallel wrapper."""
        return [unwrap(model) for model in self.models]
