"""One training step: counts, forward (teacher and student) and backward, optimizer, EMA.

Every loss is a sum divided by a count over all micro-batches and data-parallel ranks. The counts follow from the
batches alone, so they are known before the first forward, and each micro-batch's loss is divided right away: the
total is the same number under every parallel layout.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from laver_mcore.accounting.timers import Timers
from laver_mcore.data.sequence.batch import Batch
from laver_mcore.data.sequence.masking import draw_mask
from laver_mcore.device import send
from laver_mcore.megatron.optimizer import apply_gradients, master_shard, set_rates, used_learning_rate
from laver_mcore.model.inputs import ModelInputs, model_inputs
from laver_mcore.model.laver import LaverOutput
from laver_mcore.model.teacher import TeacherError
from laver_mcore.objectives.gram import gram_sum
from laver_mcore.objectives.latent import latent_sum
from laver_mcore.objectives.next_token import next_token_sum
from laver_mcore.objectives.similarity import similarity_sum
from laver_mcore.train.counts import global_counts, image_lengths, student_rows, teacher_rows, without_tails
from laver_mcore.train.engine import Engine
from laver_mcore.train.pipeline import run_pipeline
from laver_mcore.train.schedules import Knobs

UNTIMED = Timers(enabled=False)
LOSSES = ("lm_loss", "mim_loss", "gram_loss", "visual_similarity")
MEASURED = ("loss", *LOSSES)
"""What a step sums up; `loss` is what was differentiated."""

MIN_EXPECTED_MOVE = 1e-4
"""Below this `1 - momentum` a teacher may stand still by rounding alone."""


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What one step measured. Tensors stay on the device until somebody writes them down."""

    losses: torch.Tensor | None
    """[5] `MEASURED`, already divided by their global counts; None on ranks that do not compute losses."""
    counts: torch.Tensor
    """`COUNTS` over all micro-batches and data-parallel ranks."""
    learning_rate: torch.Tensor
    """The rate that the optimizer used, fp64 scalar."""
    grad_norm: torch.Tensor
    applied: torch.Tensor
    """Whether the weights were changed, bool scalar."""
    teacher_distance: torch.Tensor | None
    """Length of the teacher's move in this step (Euclidean, over all its weights); None where it does not move."""


@dataclass(frozen=True, kw_only=True)
class _MicroBatch:
    """One micro-batch on its way through the pipeline."""

    inputs: ModelInputs
    labels_T: torch.Tensor
    supervised_rows_M: torch.Tensor
    image_lengths: tuple[int, ...]
    masked_rows_M: torch.Tensor


class _TargetSum:
    """Sum and number of a step's targets, for the centre."""

    def __init__(self, center_K: torch.Tensor) -> None:
        self._sums = center_K.new_zeros(len(center_K) + 1)

    def add(self, teacher_NK: torch.Tensor) -> None:
        """Take in one micro-batch's targets."""
        self._sums[:-1] += teacher_NK.float().sum(0)
        self._sums[-1] += len(teacher_NK)

    def move_center(self, engine: Engine, applied: torch.Tensor) -> None:
        """c <- m c + (1 - m) mean(targets), the mean over all visual tokens of the step on all ranks.

        The centre of a step that is not `applied`, or that has no visual token, stays: its targets may not be finite.
        """
        dist.all_reduce(self._sums, group=engine.topology.dp_group)
        count = self._sums[-1]
        mean_K = torch.where(applied & (count > 0), self._sums[:-1] / count, engine.center_K)
        engine.center_K.lerp_(mean_K, 1.0 - engine.config.laver.center_momentum)


def draw_masks(batch: Batch, engine: Engine, knobs: Knobs) -> np.ndarray | None:
    """Mask of the micro-batch's visual tokens, bool [N]; None when LaVer is off."""
    config = engine.config
    if not config.laver.laver:
        return None
    masks = [
        draw_mask(
            h * w,
            knobs.mask_ratio,
            strategy=config.laver.mask_draw,
            seed=config.train.seed,
            key=key,
            step=knobs.iteration,
            image_index=index,
        )
        for (h, w), (key, index) in zip(batch.image_grids, batch.image_keys, strict=True)
    ]
    return np.concatenate([np.zeros(0, dtype=bool), *masks])


def _micro_batch_sums(item: _MicroBatch, output: LaverOutput, engine: Engine) -> list[torch.Tensor]:
    """The four sums of `LOSSES` over one micro-batch, fp32 scalars, the first three with gradients."""
    config, laver = engine.config, engine.config.laver
    impl = config.train.kernels
    zero = output.dialogue_TD.new_zeros((), dtype=torch.float32)
    lm = next_token_sum(
        output,
        item.labels_T,
        item.supervised_rows_M,
        vocab_size=engine.vocab_size,
        tp_group=engine.topology.tp_group,
        share=(engine.topology.cp_rank, engine.topology.cp_size),
        impl=impl,
    )
    mim = gram = zero
    if output.student_NK is not None:
        # Without images there is nothing to compare with, but the vision head still takes part in the graph.
        teacher_NK = output.teacher_NK if output.teacher_NK is not None else output.student_NK.detach()
        mim = latent_sum(
            output.student_NK,
            teacher_NK,
            item.masked_rows_M,
            center_K=engine.center_K if laver.centering else None,
            student_temperature=laver.student_temperature,
            teacher_temperature=laver.teacher_temperature,
            impl=impl,
        )
        if laver.gram != "off":
            gram = gram_sum(
                output.student_NK,
                teacher_NK,
                item.image_lengths,
                gram=laver.gram,
                gram_scope=laver.gram_scope,
                impl=impl,
            )
    visual_ND = output.dialogue_TD.detach().index_select(0, item.inputs.visual_rows_N)
    similarity = similarity_sum(visual_ND, item.image_lengths)
    # Context-parallel ranks share the LM head out by rows; all else is the same on each of them, and is summed.
    return [lm, *(total / engine.topology.cp_size for total in (mim, gram, similarity))]


def train_step(
    engine: Engine, batches: Sequence[Batch], knobs: Knobs, timers: Timers = UNTIMED
) -> StepResult:
    """Run one optimizer step over this rank's micro-batches."""
    laver, device = engine.config.laver, engine.topology.device
    batches = without_tails(batches, engine)
    masks = [draw_masks(batch, engine, knobs) for batch in batches]
    rows = student_rows(batches, engine)
    teachers = teacher_rows(batches, rows, engine)
    counts = global_counts(batches, masks, rows, teachers, engine)
    divisors = counts[: len(LOSSES)].clamp(min=1).float()
    items = [
        _MicroBatch(
            inputs=model_inputs(
                batch,
                mask,
                num_rows,
                geometry=engine.geometry,
                num_shares=engine.topology.num_shares,
                device=device,
            ),
            labels_T=send(batch.labels_T, device),
            supervised_rows_M=send(batch.supervised_rows_M, device),
            image_lengths=image_lengths(batch),
            masked_rows_M=send(torch.from_numpy(np.flatnonzero(mask if mask is not None else [])), device),
        )
        for batch, mask, num_rows in zip(batches, masks, rows, strict=True)
    ]
    teacher_weights = engine.teacher.weights if engine.teacher is not None else None
    targets = _TargetSum(engine.center_K) if laver.centering else None

    def losses_of(item: _MicroBatch, output: LaverOutput) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        sums = _micro_batch_sums(item, output, engine)
        if targets is not None and output.teacher_NK is not None:
            targets.add(output.teacher_NK)
        lm, mim, gram, similarity = (total / divisor for total, divisor in zip(sums, divisors, strict=True))
        loss = lm + laver.lambda_laver * mim + laver.lambda_gram * gram
        # Megatron would divide by the second value; the losses are divided already.
        measured = torch.stack([loss, lm, mim, gram, similarity]).detach()
        return loss, torch.zeros((), dtype=torch.int32), measured

    def forward_step(data: Iterator[_MicroBatch], model: torch.nn.Module) -> tuple[Any, Callable[..., Any]]:
        item = next(data)
        return model(item.inputs, teacher_weights, timers.part), partial(losses_of, item)

    for model in engine.models:
        model.zero_grad_buffer()
    engine.optimizer.zero_grad()
    set_rates(engine.optimizer, knobs.learning_rate, engine.config.optimizer.weight_decay)
    # Between stages the teacher's rows travel behind the student's.
    travelling = [a + b for a, b in zip(rows, teachers, strict=True)]
    with timers.part("student"):
        collected = run_pipeline(engine, items, travelling, forward_step, forward_only=False)
    with timers.part("optimizer"):
        grad_norm, applied = apply_gradients(engine.optimizer)
    with timers.part("ema"):
        teacher_distance = _move_teacher(engine, targets, knobs, applied)
    return StepResult(
        losses=_reduce_losses(collected, engine),
        counts=counts,
        learning_rate=used_learning_rate(engine.optimizer, engine.topology),
        grad_norm=grad_norm,
        applied=applied,
        teacher_distance=teacher_distance,
    )


def _reduce_losses(collected: list[torch.Tensor], engine: Engine) -> torch.Tensor | None:
    if not engine.topology.on_last_stage:
        return None
    losses = torch.stack(collected).sum(0)
    dist.all_reduce(losses, group=engine.topology.dp_cp_group)
    return losses


@torch.no_grad()
def _move_teacher(
    engine: Engine, targets: _TargetSum | None, knobs: Knobs, applied: torch.Tensor
) -> torch.Tensor | None:
    """Centre and averages after a step; a step that was not `applied` moves neither."""
    teacher = engine.teacher
    if teacher is None:
        return None
    if targets is not None and engine.topology.on_last_stage:
        targets.move_center(engine, applied)
    if not knobs.update_teacher:
        return None
    # Momentum 1 keeps an average as it is. The device decides: the host does not know yet whether the step was applied.
    return teacher.update(master_shard, 1.0 - (1.0 - knobs.momentum) * applied.double())


def check_teacher_moved(distance: float, knobs: Knobs, student_moved: bool) -> None:
    """Raise `TeacherError` if the teacher stood still at its turn although the student has changed.

    The released ZeRO-3 code averages empty shards and never notices; here it stops the run.
    """
    if (
        knobs.update_teacher
        and student_moved
        and 1.0 - knobs.momentum > MIN_EXPECTED_MOVE
        and distance == 0.0
    ):
        raise TeacherError(
            f"iteration {knobs.iteration + 1}: the teacher did not move at momentum {knobs.momentum:.4f} although the "
            "student has; its averages are not connected to the optimizer's weights"
        )
