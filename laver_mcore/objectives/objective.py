"""What a method adds to the language model's loss: the protocol between an objective and the engine.

    Settings     its section of a recipe, and what is known of it before anything is built (`config.schema`)
    modules      parameters of its own, on the first pipeline stage and on the last
    plan         on the host, before any forward: what is masked, and what each term is divided by
    prepare      on the first stage, as soon as a micro-batch's visual tokens are there: work for host threads
    enter        visual tokens -> rows of the dialogue, image rows, rows that travel on        (`model.method`)
    target       what the teacher's final states become                                        (`model.method`)
    sums         {term: sum} of one micro-batch; the engine divides by global counts and weighs
    after_step   what follows the optimizer: an average, a centre

The engine adds the language model's own term. Every term is a sum over a count: the loss of a step is
`sum(weight[t] * sum[t] / count[t])` with both over all micro-batches and data-parallel ranks, so it is the same number
under every parallel layout.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch

from laver_mcore.config.schema import Config, ObjectiveConfig
from laver_mcore.data.sequence.batch import Batch
from laver_mcore.model.method import Added, Method, ModelOutput, Plain

if TYPE_CHECKING:  # a recipe's settings are read, and a plan is made, without Megatron
    from laver_mcore.megatron.parallel import Topology
    from laver_mcore.megatron.weight_shards import Bucket
    from laver_mcore.model.teacher import MasterShard, Teacher
    from laver_mcore.model.vision_language import VisionLanguageModel


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What an objective has decided for one micro-batch."""

    counts: Mapping[str, int]
    """What each of its terms is divided by: this micro-batch's part."""
    masked: int = 0
    """Visual tokens that the model does not see, for the account of a step's work."""


def image_masks(config: Config, batch: Batch, iteration: int) -> list[np.ndarray]:
    """Which tokens of each image of a micro-batch the model does not see, bool, as the objective's settings say."""
    return [
        config.objective.mask(config, h * w, key=key, image_index=index, iteration=iteration)
        for (h, w), (key, index) in zip(batch.image_grids, batch.image_keys, strict=True)
    ]


def joined(masks: Sequence[np.ndarray]) -> np.ndarray:
    """Masks of all images as one over the micro-batch's visual tokens, bool [N]."""
    return np.concatenate([np.zeros(0, dtype=bool), *masks])


@dataclass(frozen=True, kw_only=True)
class TeacherMove:
    """One move of a teacher towards the student."""

    distance: torch.Tensor
    """Length of the move over the whole model (Euclidean), scalar."""
    momentum: float


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What the engine hands to an objective that is being built."""

    chunks: "list[VisionLanguageModel]"
    topology: "Topology"
    buckets: "Sequence[Bucket]"
    """How the trainable parameters are cut into the fp32 masters that this rank keeps."""

    def own(self, name: str) -> Any:
        """The module or parameter of this name that the objective has added, or None on other pipeline stages."""
        return next((getattr(chunk, name) for chunk in self.chunks if hasattr(chunk, name)), None)


class Objective(Method, Protocol):
    """A method; its state, on every rank alike."""

    Settings: type[ObjectiveConfig]
    """Its section of a recipe."""
    weights: Mapping[str, float]
    """Term -> its weight in the loss, in the order in which they are logged."""
    teacher: "Teacher | None"
    """Weights that the model computes with beside its own, if any."""
    looks_ahead: bool
    """Whether images are encoded one micro-batch ahead, so that `prepare` has the time of a pass."""

    @staticmethod
    def modules(config: Config, place: str, *, dtype: torch.dtype, device: torch.device) -> Added:
        """What `Settings.parameters` lists for the "first" or "last" stage; the engine gives it its values."""

    @classmethod
    def build(cls, config: Config, parts: Parts) -> "Objective":
        """The objective of a run."""

    def plan(self, batch: Batch, iteration: int) -> Any:
        """A `Plan`, or one of its children, for one micro-batch of the step after `iteration` finished ones."""

    def prepare(self, visual_ND: torch.Tensor, plan: Any) -> None:
        """Begin what `enter` will need of a micro-batch's visual tokens; on the first stage, where it looks ahead."""

    def sums(self, output: ModelOutput, plan: Any) -> Mapping[str, torch.Tensor]:
        """Sum of every term over one micro-batch, fp32 scalars with gradients; on the last stage."""

    def after_step(
        self, applied: torch.Tensor, iteration: int, master_shard: "MasterShard"
    ) -> TeacherMove | None:
        """Follow the optimizer's step, unless it was not `applied`; the teacher's move if it is due."""

    def settings(self, iteration: int) -> Mapping[str, float]:
        """What changes from step to step, for the metrics."""

    def tensors(self) -> Mapping[str, torch.Tensor]:
        """What a checkpoint keeps of the last stage beside all weights and averages; loading changes it in place."""


class LanguageModel(Plain):
    """The language model's loss alone; a method that adds little to it may inherit the rest."""

    Settings: type[ObjectiveConfig] = ObjectiveConfig
    weights: Mapping[str, float] = {}
    teacher: "Teacher | None" = None
    looks_ahead = False

    @staticmethod
    def modules(config: Config, place: str, *, dtype: torch.dtype, device: torch.device) -> Added:
        return {}

    @classmethod
    def build(cls, config: Config, parts: Parts) -> "LanguageModel":
        return cls()

    def plan(self, batch: Batch, iteration: int) -> Plan:
        return Plan(counts={})

    def prepare(self, visual_ND: torch.Tensor, plan: Any) -> None:
        pass

    def sums(self, output: ModelOutput, plan: Any) -> Mapping[str, torch.Tensor]:
        return {}

    def after_step(
        self, applied: torch.Tensor, iteration: int, master_shard: "MasterShard"
    ) -> TeacherMove | None:
        return None

    def settings(self, iteration: int) -> Mapping[str, float]:
        return {}

    def tensors(self) -> Mapping[str, torch.Tensor]:
        return {}
