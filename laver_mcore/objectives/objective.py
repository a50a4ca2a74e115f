"""What a method adds to the language model's loss: the protocol between an objective and the engine.

    plan         on the host, before any forward: what is masked, and what each term is divided by
    sums         {term: sum} of one micro-batch; the engine divides by global counts and weighs
    after_step   what follows the optimizer: an average, a centre

The engine adds the language model's own term. Every term is a sum over a count: the loss of a step is
`sum(weight[t] * sum[t] / count[t])` with both over all micro-batches and data-parallel ranks, so it is the same number
under every parallel layout.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Protocol

import numpy as np
import torch

from laver_mcore.config.objectives import objective_spec
from laver_mcore.config.schema import Config
from laver_mcore.data.sequence.batch import Batch
from laver_mcore.megatron.parallel import Topology
from laver_mcore.megatron.weight_shards import Bucket
from laver_mcore.model.laver import LaverModel, LaverOutput
from laver_mcore.model.teacher import MasterShard, Teacher


class StepKnobs(Protocol):
    """What changes from step to step, as far as an objective looks at it."""

    @property
    def iteration(self) -> int: ...
    @property
    def mask_ratio(self) -> float: ...
    @property
    def momentum(self) -> float: ...
    @property
    def update_teacher(self) -> bool: ...


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What an objective has decided for one micro-batch."""

    counts: Mapping[str, int]
    """What each of its terms is divided by: this micro-batch's part."""
    masked_N: np.ndarray | None = None
    """Visual tokens that are replaced in the reconstruction rows, bool; None where there are no such rows."""


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What the engine hands to an objective that is being built."""

    chunks: list[LaverModel]
    topology: Topology
    buckets: Sequence[Bucket]
    """How the trainable parameters are cut into the fp32 masters that this rank keeps."""


class Objective(Protocol):
    """A method; its state, on every rank alike."""

    weights: Mapping[str, float]
    """Term -> its weight in the loss, in the order in which they are logged."""
    teacher: Teacher | None
    """Weights that the model computes with beside its own, if any."""

    @classmethod
    def build(cls, config: Config, parts: Parts) -> "Objective":
        """The objective of a run."""

    def plan(self, batch: Batch, knobs: StepKnobs) -> Any:
        """A `Plan`, or one of its children, for one micro-batch."""

    def sums(self, output: LaverOutput, plan: Any) -> Mapping[str, torch.Tensor]:
        """Sum of every term over one micro-batch, fp32 scalars with gradients; on the last stage."""

    def after_step(
        self, applied: torch.Tensor, knobs: StepKnobs, master_shard: MasterShard
    ) -> torch.Tensor | None:
        """Follow the optimizer's step, unless it was not `applied`; the length of the teacher's move if it is due."""

    def settings(self, knobs: StepKnobs) -> Mapping[str, float]:
        """What changes from step to step, for the metrics."""

    def tensors(self) -> Mapping[str, torch.Tensor]:
        """What a checkpoint keeps of the last stage beside all weights and averages; loading changes it in place."""


class LanguageModel:
    """The language model's loss alone."""

    weights: Mapping[str, float] = {}
    teacher: Teacher | None = None

    @classmethod
    def build(cls, config: Config, parts: Parts) -> "LanguageModel":
        return cls()

    def plan(self, batch: Batch, knobs: StepKnobs) -> Plan:
        return Plan(counts={})

    def sums(self, output: LaverOutput, plan: Plan) -> Mapping[str, torch.Tensor]:
        return {}

    def after_step(
        self, applied: torch.Tensor, knobs: StepKnobs, master_shard: MasterShard
    ) -> torch.Tensor | None:
        return None

    def settings(self, knobs: StepKnobs) -> Mapping[str, float]:
        return {}

    def tensors(self) -> Mapping[str, torch.Tensor]:
        return {}


def load_objective(name: str) -> type[Objective]:
    """The class of the objective called `name`; `ConfigError` for an unknown one."""
    module, _, attribute = objective_spec(name).path.partition(":")
    found: type[Objective] = getattr(import_module(module), attribute)
    return found
