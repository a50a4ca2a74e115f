"""The objects of a run, wired once by `build` and handed to whoever works with them."""

from dataclasses import dataclass

from megatron.core.optimizer.optimizer import MegatronOptimizer

from laver_mcore.model.network import Network
from laver_mcore.model.teacher import Teacher
from laver_mcore.objectives.objective import Objective


@dataclass(frozen=True, kw_only=True)
class Engine(Network):
    """A network in training."""

    optimizer: MegatronOptimizer
    objective: Objective
    tokenizer_digest: str | None = None
    """Of the tokenizer's content, which goes into checkpoints."""

    @property
    def teacher(self) -> Teacher | None:
        """The objective's teacher, if it has one."""
        return self.objective.teacher
