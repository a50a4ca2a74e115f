"""LaVer: latent visual reconstruction (arXiv 2512.06281).

Visual tokens are masked at the decoder's input and recovered in its latent space against an EMA teacher (MIM); a Gram
loss keeps them from growing more alike than the teacher's:

    image rows: visual tokens, the mask token where masked -> decoder -> vision head -> student [N, K]
                visual tokens, whole, with the teacher's weights: decoder -> vision head -> targets [N, K]

Shapes: N visual tokens of a micro-batch, M masked ones, D width, K latent width.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import torch
import torch.distributed as dist

from laver_mcore.config.errors import ConfigError
from laver_mcore.config.schema import AddedWeight, Config, ObjectiveConfig, TeacherSpec
from laver_mcore.data.sequence.batch import Batch
from laver_mcore.data.sequence.masking import draw_mask
from laver_mcore.device import send
from laver_mcore.model.method import Added, Entering, ModelOutput
from laver_mcore.objectives.gram import gram_sum, num_gram_matrices
from laver_mcore.objectives.head import Head, head_weights
from laver_mcore.objectives.latent import latent_sum
from laver_mcore.objectives.objective import LanguageModel, Parts, Plan, TeacherMove, image_masks, joined
from laver_mcore.objectives.schedules import mask_ratio, masked_over_run, momentum

if TYPE_CHECKING:
    from laver_mcore.megatron.parallel import Topology
    from laver_mcore.model.teacher import MasterShard, Teacher

MIM, GRAM = "mim_loss", "gram_loss"


@dataclass(frozen=True, kw_only=True)
class LaverConfig(ObjectiveConfig):
    """Latent visual reconstruction (arXiv 2512.06281), `objective: laver`: losses, teacher, schedules."""

    name: ClassVar[str] = "laver"
    reconstructs: ClassVar[bool] = True
    may_change: ClassVar[frozenset[str]] = frozenset({"teacher_precision"})

    mask_ratio: float = 0.05
    """Share r of visual tokens masked at the decoder's input, at the end of its schedule."""
    mask_strategy: Literal["cosine", "constant"] = "cosine"
    """Schedule of the mask ratio: cosine 0 -> r, or 0 for the first 12.5 % and then r."""
    mask_draw: Literal["permutation", "bernoulli"] = "permutation"
    """Exactly floor(r N) masked tokens per image, or each with probability r."""
    momentum: float = 0.95
    """EMA momentum m of the teacher at the start of its schedule."""
    momentum_strategy: Literal["cosine", "constant"] = "cosine"
    """Schedule of the momentum: cosine m -> 1, or m throughout."""
    ema_ratio: float = 0.02
    """The teacher moves every max(1, int(train_iters * ema_ratio)) iterations."""
    ema_steps: int | None = None
    """Iterations between two moves of the teacher; wins over ema_ratio."""
    offload_teacher: bool = False
    """Keep the teacher's fp32 average in host memory; it visits the device only when the teacher moves."""
    teacher_precision: Literal["same", "fp8"] = "same"
    """The decoder's matrix products in the teacher's forward: the model's precision, or fp8 (Hopper, Ada or newer)."""
    lambda_laver: float = 1.0
    """Weight of the masked reconstruction loss (MIM)."""
    lambda_gram: float = 1.0
    """Weight of the Gram loss."""
    gram: Literal["cga", "ga", "off"] = "cga"
    """Gram loss: clipped (only similarities above the teacher's cost), symmetric, or none."""
    gram_scope: Literal["image", "micro_batch"] = "image"
    """Gram matrices per image (paper) or over all visual tokens of a micro-batch (released code)."""
    student_temperature: float = 0.1
    """Softmax temperature of the student."""
    teacher_temperature: float = 0.04
    """Softmax temperature of the teacher."""
    centering: bool = False
    """Subtract a running mean from the teacher's outputs before its softmax."""
    center_momentum: float = 0.9
    """Momentum of that running mean."""
    vision_head_hidden_size: int = 2048
    """Inner width of the 3-layer vision head."""

    def check(self, config: Config) -> None:
        super().check(config)
        for name in ("mask_ratio", "momentum", "ema_ratio", "center_momentum"):
            value = getattr(self, name)
            if not 0.0 <= value <= 1.0:
                raise ConfigError(f"{name}={value} is not between 0 and 1")
        for name in ("student_temperature", "teacher_temperature"):
            if not getattr(self, name) > 0.0:
                raise ConfigError(f"{name}={getattr(self, name)} must be positive")
        if self.ema_steps is not None and self.ema_steps < 1:
            raise ConfigError(f"ema_steps={self.ema_steps} must be at least 1")

    def parameters(self, config: Config) -> tuple[AddedWeight, ...]:
        width = config.model.hidden_size or 0
        head = head_weights("vision_head", self.head_widths(width), last_bias=False)
        return (AddedWeight(name="mask_token", shape=(width,), place="first"), *head)

    def head_widths(self, width: int) -> tuple[int, ...]:
        """Widths of the vision head on a decoder of this one (released code)."""
        return (width, self.vision_head_hidden_size, self.vision_head_hidden_size, width)

    def teacher(self, config: Config) -> TeacherSpec:
        return TeacherSpec(
            averaged=("language_model.", "vision_head."),
            moves_every=self.moves_every(config),
            precision=self.teacher_precision,
            offload=self.offload_teacher,
        )

    def moves_every(self, config: Config) -> int:
        """Iterations between two moves of the teacher."""
        return self.ema_steps or max(1, int(config.train.train_iters * self.ema_ratio))

    def gram_pairs(self, image_lengths: Sequence[int]) -> int:
        if self.gram == "off":
            return 0
        lengths = (sum(image_lengths),) if self.gram_scope == "micro_batch" else image_lengths
        return sum(n * n for n in lengths)

    def masked_share(self) -> float:
        return self.mask_ratio

    def mask(
        self, config: Config, num_tokens: int, *, key: str, image_index: int, iteration: int
    ) -> np.ndarray:
        """A function of (seed, sample, image, iteration) alone, so that every parallel layout masks the same."""
        total = config.train.train_iters
        return draw_mask(
            num_tokens,
            mask_ratio(self.mask_ratio, self.mask_strategy, iteration, total),
            strategy=self.mask_draw,
            seed=config.train.seed,
            key=key,
            step=iteration,
            image_index=image_index,
        )

    def remarks(self, config: Config, image_tokens: int) -> tuple[str, ...]:
        total, ratio = config.train.train_iters, self.mask_ratio
        ratios = (mask_ratio(ratio, self.mask_strategy, iteration, total) for iteration in range(total))
        mean, first = masked_over_run([math.floor(r * image_tokens) for r in ratios])
        if first is None and self.mask_draw == "permutation":
            lost = f"for floor({ratio:g} x {image_tokens}) is 0 at every iteration; raise mask_ratio"
            return (f"warning: no visual token is ever masked, {lost}",)
        start = "" if first is None else f", the first at iteration {first + 1:,} of {total:,}"
        return (f"masked: {mean:.2f} of an image's {image_tokens} tokens, on average over the run{start}",)

    def saved_per_visual_token(self, config: Config) -> int:
        # The vision head, the teacher's targets, the gradient that the masked loss makes in its forward.
        return 4 * self.vision_head_hidden_size + 3 * (config.model.hidden_size or 0)


@dataclass(frozen=True, kw_only=True)
class LaverPlan(Plan):
    """One micro-batch's masks, and the numbers of tokens of its images."""

    masked_N: torch.Tensor
    """Which visual tokens the student does not see, bool."""
    masked_rows_M: torch.Tensor
    image_lengths: tuple[int, ...]


class Laver(LanguageModel):
    """MIM and Gram loss, the teacher and its centre.

    The centre is a running mean of the teacher's outputs, on the last stage; zero while centring is off.
    """

    Settings = LaverConfig

    @staticmethod
    def modules(config: Config, place: str, *, dtype: torch.dtype, device: torch.device) -> Added:
        settings, width = config.objective, config.model.hidden_size
        assert isinstance(settings, LaverConfig) and width is not None
        if place == "first":
            return {"mask_token": torch.nn.Parameter(torch.zeros(width, dtype=dtype, device=device))}
        widths = settings.head_widths(width)
        return {"vision_head": Head(widths, torch.nn.GELU, last_bias=False, dtype=dtype, device=device)}

    @classmethod
    def build(cls, config: Config, parts: Parts) -> "Laver":
        from laver_mcore.model.teacher import Teacher

        spec = config.objective.teacher(config)
        assert spec is not None
        teacher = Teacher(
            parts.chunks,
            parts.topology,
            parts.buckets,
            config.train.kernels,
            averaged=spec.averaged,
            offload=spec.offload,
        )
        found = cls(config, parts.topology, teacher)
        found._mask_token, found._vision_head = parts.own("mask_token"), parts.own("vision_head")
        return found

    def __init__(self, config: Config, topology: "Topology", teacher: "Teacher") -> None:
        assert isinstance(config.objective, LaverConfig) and config.model.hidden_size is not None
        self._recipe, self._config, self._impl = config, config.objective, config.train.kernels
        self._topology, self._moves_every = topology, config.objective.moves_every(config)
        self._mask_token: Any = None
        self._vision_head: Any = None
        self.teacher: Teacher | None = teacher
        self.weights: Mapping[str, float] = {MIM: self._config.lambda_laver}
        if self._config.gram != "off":
            self.weights |= {GRAM: self._config.lambda_gram}
        self.center_K = torch.zeros(config.model.hidden_size, device=topology.device)
        # Sum of a step's targets and, behind it, their number.
        self._targets_K1 = self.center_K.new_zeros(len(self.center_K) + 1)

    def settings(self, iteration: int) -> Mapping[str, float]:
        own, total = self._config, self._recipe.train.train_iters
        return {
            "mask_ratio": mask_ratio(own.mask_ratio, own.mask_strategy, iteration, total),
            "momentum": momentum(own.momentum, own.momentum_strategy, iteration, total),
        }

    def plan(self, batch: Batch, iteration: int) -> LaverPlan:
        masked_N, lengths = joined(image_masks(self._recipe, batch, iteration)), batch.image_lengths
        counts = {MIM: int(masked_N.sum()), GRAM: num_gram_matrices(lengths, self._config.gram_scope)}
        return LaverPlan(
            counts={term: counts[term] for term in self.weights},
            masked=counts[MIM],
            masked_N=send(torch.from_numpy(masked_N), self._topology.device),
            masked_rows_M=send(torch.from_numpy(np.flatnonzero(masked_N)), self._topology.device),
            image_lengths=lengths,
        )

    def enter(self, visual_ND: torch.Tensor, plan: LaverPlan) -> Entering:
        return Entering(
            dialogue_ND=visual_ND,
            images_ND=torch.where(plan.masked_N[:, None], self._mask_token, visual_ND),
            taught_ND=visual_ND.detach(),
        )

    def target(self, states_ND: torch.Tensor) -> torch.Tensor:
        return self._vision_head(states_ND)

    def sums(self, output: ModelOutput, plan: LaverPlan) -> Mapping[str, torch.Tensor]:
        assert output.images_ND is not None
        student_NK = self._vision_head(output.images_ND)
        # Without images there is nothing to compare with, but the vision head still takes part in the graph.
        teacher_NK = output.target_NK if output.target_NK is not None else student_NK.detach()
        if output.target_NK is not None and self._config.centering:
            self._targets_K1[:-1] += output.target_NK.float().sum(0)
            self._targets_K1[-1] += len(output.target_NK)
        found = {
            MIM: latent_sum(
                student_NK,
                teacher_NK,
                plan.masked_rows_M,
                center_K=self.center_K if self._config.centering else None,
                student_temperature=self._config.student_temperature,
                teacher_temperature=self._config.teacher_temperature,
                impl=self._impl,
            )
        }
        if GRAM in self.weights:
            found[GRAM] = gram_sum(
                student_NK,
                teacher_NK,
                plan.image_lengths,
                gram=self._config.gram,
                gram_scope=self._config.gram_scope,
                impl=self._impl,
            )
        return found

    @torch.no_grad()
    def after_step(
        self, applied: torch.Tensor, iteration: int, master_shard: "MasterShard"
    ) -> TeacherMove | None:
        assert self.teacher is not None
        if self._config.centering and self._topology.on_last_stage:
            self._move_center(applied)
        if (iteration + 1) % self._moves_every:
            return None
        # Momentum 1 keeps an average as it is. The device decides: the host does not know yet whether the step counts.
        m = self.settings(iteration)["momentum"]
        distance = self.teacher.update(master_shard, 1.0 - (1.0 - m) * applied.double())
        return TeacherMove(distance=distance, momentum=m)

    def _move_center(self, applied: torch.Tensor) -> None:
        """c <- m c + (1 - m) mean(targets), the mean over all visual tokens of the step on all ranks.

        The centre of a step that is not `applied`, or that has no visual token, stays: its targets may not be finite.
        """
        dist.all_reduce(self._targets_K1, group=self._topology.dp_group)
        count = self._targets_K1[-1]
        mean_K = torch.where(applied & (count > 0), self._targets_K1[:-1] / count, self.center_K)
        self.center_K.lerp_(mean_K, 1.0 - self._config.center_momentum)
        self._targets_K1.zero_()

    def tensors(self) -> Mapping[str, torch.Tensor]:
        return {"teacher_center": self.center_K}
