"""LaVer: latent visual reconstruction (arXiv 2512.06281).

Visual tokens are masked at the decoder's input and recovered in its latent space against an EMA teacher (MIM); a Gram
loss keeps them from growing more alike than the teacher's. Shapes: N visual tokens of a micro-batch, M masked ones, K
latent width.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist

from laver_mcore.config.schema import Config, LaverConfig
from laver_mcore.data.sequence.batch import Batch
from laver_mcore.data.sequence.masking import draw_mask
from laver_mcore.device import send
from laver_mcore.megatron.parallel import Topology
from laver_mcore.model.laver import LaverOutput
from laver_mcore.model.teacher import MasterShard, Teacher
from laver_mcore.objectives.gram import gram_sum, num_gram_matrices
from laver_mcore.objectives.latent import latent_sum
from laver_mcore.objectives.objective import Parts, Plan, StepKnobs

MIM, GRAM = "mim_loss", "gram_loss"


@dataclass(frozen=True, kw_only=True)
class LaverPlan(Plan):
    """One micro-batch's masks, and the numbers of tokens of its images."""

    masked_rows_M: torch.Tensor
    image_lengths: tuple[int, ...]


def draw_masks(batch: Batch, config: LaverConfig, ratio: float, *, seed: int, step: int) -> np.ndarray:
    """Mask of the micro-batch's visual tokens, bool [N]: a function of (seed, sample, image, step) alone."""
    masks = [
        draw_mask(h * w, ratio, strategy=config.mask_draw, seed=seed, key=key, step=step, image_index=index)
        for (h, w), (key, index) in zip(batch.image_grids, batch.image_keys, strict=True)
    ]
    return np.concatenate([np.zeros(0, dtype=bool), *masks])


class Laver:
    """MIM and Gram loss, the teacher and its centre.

    The centre is a running mean of the teacher's outputs, on the last stage; zero while centring is off.
    """

    @classmethod
    def build(cls, config: Config, parts: Parts) -> "Laver":
        teacher = Teacher(
            parts.chunks,
            parts.topology,
            parts.buckets,
            config.train.kernels,
            offload=config.laver.offload_teacher,
        )
        return cls(config, parts.topology, teacher)

    def __init__(self, config: Config, topology: Topology, teacher: Teacher) -> None:
        assert config.model.hidden_size is not None
        self._config, self._seed, self._impl = config.laver, config.train.seed, config.train.kernels
        self._topology = topology
        self.teacher: Teacher | None = teacher
        self.weights: Mapping[str, float] = {MIM: config.laver.lambda_laver}
        if config.laver.gram != "off":
            self.weights |= {GRAM: config.laver.lambda_gram}
        self.center_K = torch.zeros(config.model.hidden_size, device=topology.device)
        # Sum of a step's targets and, behind it, their number.
        self._targets_K1 = self.center_K.new_zeros(len(self.center_K) + 1)

    def plan(self, batch: Batch, knobs: StepKnobs) -> LaverPlan:
        masked_N = draw_masks(batch, self._config, knobs.mask_ratio, seed=self._seed, step=knobs.iteration)
        lengths = batch.image_lengths
        counts = {MIM: int(masked_N.sum()), GRAM: num_gram_matrices(lengths, self._config.gram_scope)}
        return LaverPlan(
            counts={term: counts[term] for term in self.weights},
            masked_N=masked_N,
            masked_rows_M=send(torch.from_numpy(np.flatnonzero(masked_N)), self._topology.device),
            image_lengths=lengths,
        )

    def sums(self, output: LaverOutput, plan: LaverPlan) -> Mapping[str, torch.Tensor]:
        student_NK = output.student_NK
        assert student_NK is not None
        # Without images there is nothing to compare with, but the vision head still takes part in the graph.
        teacher_NK = output.teacher_NK if output.teacher_NK is not None else student_NK.detach()
        if output.teacher_NK is not None and self._config.centering:
            self._targets_K1[:-1] += output.teacher_NK.float().sum(0)
            self._targets_K1[-1] += len(output.teacher_NK)
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
        self, applied: torch.Tensor, knobs: StepKnobs, master_shard: MasterShard
    ) -> torch.Tensor | None:
        assert self.teacher is not None
        if self._config.centering and self._topology.on_last_stage:
            self._move_center(applied)
        if not knobs.update_teacher:
            return None
        # Momentum 1 keeps an average as it is. The device decides: the host does not know yet whether the step counts.
        return self.teacher.update(master_shard, 1.0 - (1.0 - knobs.momentum) * applied.double())

    def _move_center(self, applied: torch.Tensor) -> None:
        """c <- m c + (1 - m) mean(targets), the mean over all visual tokens of the step on all ranks.

        The centre of a step that is not `applied`, or that has no visual token, stays: its targets may not be finite.
        """
        dist.all_reduce(self._targets_K1, group=self._topology.dp_group)
        count = self._targets_K1[-1]
        mean_K = torch.where(applied & (count > 0), self._targets_K1[:-1] / count, self.center_K)
        self.center_K.lerp_(mean_K, 1.0 - self._config.center_momentum)
        self._targets_K1.zero_()

    def settings(self, knobs: StepKnobs) -> Mapping[str, float]:
        return {"mask_ratio": knobs.mask_ratio, "momentum": knobs.momentum}

    def tensors(self) -> Mapping[str, torch.Tensor]:
        return {"teacher_center": self.center_K}
