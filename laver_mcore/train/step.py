"""One training step: counts, forward (teacher and student) and backward, optimizer, what the objective does after it.

Every loss is a sum divided by a count over all micro-batches and data-parallel ranks. The counts follow from the
batches alone, so they are known before the first forward, and each micro-batch's loss is divided right away: the
total is the same number under every parallel layout.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from laver_mcore.accounting.timers import Timers
from laver_mcore.data.sequence.batch import Batch
from laver_mcore.device import send
from laver_mcore.megatron.optimizer import apply_gradients, master_shard, set_rates, used_learning_rate
from laver_mcore.model.inputs import ModelInputs, model_inputs
from laver_mcore.model.method import ModelOutput
from laver_mcore.model.parameters import unwrap
from laver_mcore.model.teacher import TeacherError
from laver_mcore.model.vision_language import VisionLanguageModel
from laver_mcore.objectives.next_token import next_token_sum
from laver_mcore.objectives.objective import Plan, TeacherMove
from laver_mcore.objectives.similarity import similarity_sum
from laver_mcore.train.counts import (
    LM_LOSS,
    SIMILARITY,
    global_counts,
    student_rows,
    teacher_rows,
    terms,
    travelling_rows,
    without_tails,
)
from laver_mcore.train.engine import Engine
from laver_mcore.train.pipeline import run_pipeline
from laver_mcore.train.schedules import learning_rate

UNTIMED = Timers(enabled=False)

MIN_EXPECTED_MOVE = 1e-4
"""Below this `1 - momentum` a teacher may stand still by rounding alone."""


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What one step measured. Tensors stay on the device until somebody writes them down."""

    terms: tuple[str, ...]
    losses: torch.Tensor | None
    """The loss that was differentiated, then the `terms`, each divided by its global count, fp32; None on ranks that do
    not compute losses."""
    counts: torch.Tensor
    """What each term was divided by, float64."""
    work: torch.Tensor
    """The step's work, float64, as `accounting.work.WORK` lists it; like the counts, over all data-parallel ranks."""
    learning_rate: torch.Tensor
    """The rate that the optimizer used, fp64 scalar."""
    grad_norm: torch.Tensor
    applied: torch.Tensor
    """Whether the weights were changed, bool scalar."""
    teacher_move: TeacherMove | None
    """None where it is not the teacher's turn."""

    def named_losses(self) -> dict[str, float]:
        """`loss` and every term by name, empty on ranks that do not compute losses; waits for the device."""
        if self.losses is None:
            return {}
        return dict(zip(("loss", *self.terms), self.losses.tolist(), strict=True))


@dataclass(frozen=True, kw_only=True)
class _MicroBatch:
    """One micro-batch on its way through the pipeline."""

    inputs: ModelInputs
    labels_T: torch.Tensor
    supervised_rows_M: torch.Tensor
    image_lengths: tuple[int, ...]
    plan: Plan


def _micro_batch_sums(item: _MicroBatch, output: ModelOutput, engine: Engine) -> Mapping[str, torch.Tensor]:
    """The sum of every term over one micro-batch, fp32 scalars, those of losses with gradients."""
    topology = engine.topology
    lm = next_token_sum(
        output,
        item.labels_T,
        item.supervised_rows_M,
        vocab_size=engine.vocab_size,
        tp_group=topology.tp_group,
        share=(topology.cp_rank, topology.cp_size),
        impl=engine.config.train.kernels,
    )
    visual_ND = output.dialogue_TD.detach().index_select(0, item.inputs.visual_rows_N)
    others = {
        **engine.objective.sums(output, item.plan),
        SIMILARITY: similarity_sum(visual_ND, item.image_lengths),
    }
    # Context-parallel ranks share the LM head out by rows; all else is the same on each of them, and is summed.
    return {LM_LOSS: lm, **{term: total / topology.cp_size for term, total in others.items()}}


class _Ahead:
    """Encodes the images of the next micro-batch before a pass begins, where the objective wants to look ahead.

    What `prepare` then does on the host has the time of a pass; only a step's first micro-batch waits for all of it.
    """

    def __init__(self, items: Sequence[_MicroBatch], engine: Engine, timers: Timers) -> None:
        self._items, self._objective, self._timers = items, engine.objective, timers
        self._visual: dict[int, torch.Tensor | None] = {}

    def visual_tokens(self, item: _MicroBatch, model: Any) -> torch.Tensor | None:
        """Visual tokens of this micro-batch, if they are there already; None leaves them to the model."""
        if not self._objective.looks_ahead or not unwrap(model).pre_process:
            return None
        place = next(i for i, one in enumerate(self._items) if one is item)
        for number in range(place, min(place + 2, len(self._items))):
            if number not in self._visual:
                self._visual[number] = self._encode(self._items[number], unwrap(model))
        return self._visual.pop(place)

    def _encode(self, item: _MicroBatch, model: VisionLanguageModel) -> torch.Tensor | None:
        with self._timers.part("vision"):
            visual_ND = model.visual_tokens(item.inputs)
        if visual_ND is not None:
            self._objective.prepare(visual_ND, item.plan)
        return visual_ND


def _micro_batches(
    batches: Sequence[Batch],
    plans: Sequence[Plan],
    rows: Sequence[int],
    travelling: Sequence[tuple[int, ...]],
    engine: Engine,
) -> list[_MicroBatch]:
    device = engine.topology.device
    return [
        _MicroBatch(
            inputs=model_inputs(
                batch,
                num_rows,
                reconstruct=engine.config.objective.reconstructs,
                travelling=groups,
                geometry=engine.geometry,
                num_shares=engine.topology.num_shares,
                device=device,
            ),
            labels_T=send(batch.labels_T, device),
            supervised_rows_M=send(batch.supervised_rows_M, device),
            image_lengths=batch.image_lengths,
            plan=plan,
        )
        for batch, plan, num_rows, groups in zip(batches, plans, rows, travelling, strict=True)
    ]


def train_step(
    engine: Engine, batches: Sequence[Batch], iteration: int, timers: Timers = UNTIMED
) -> StepResult:
    """Run the optimizer step that follows `iteration` finished ones, over this rank's micro-batches."""
    objective, names = engine.objective, terms(engine)
    batches = without_tails(batches, engine)
    plans = [objective.plan(batch, iteration) for batch in batches]
    rows = student_rows(batches, engine)
    teachers = teacher_rows(batches, rows, engine)
    counts = global_counts(batches, plans, rows, teachers, engine)
    divisors = dict(zip(names, counts.terms.clamp(min=1).float(), strict=True))
    groups = travelling_rows(batches, engine)
    items = _micro_batches(batches, plans, rows, groups, engine)
    ahead = _Ahead(items, engine, timers)

    def losses_of(item: _MicroBatch, output: ModelOutput) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        sums = _micro_batch_sums(item, output, engine)
        found = {term: sums[term] / divisors[term] for term in names}
        loss = found[LM_LOSS]
        for term, weight in objective.weights.items():
            loss = loss + weight * found[term]
        # Megatron would divide by the second value; the losses are divided already.
        measured = torch.stack([loss, *found.values()]).detach()
        return loss, torch.zeros((), dtype=torch.int32), measured

    def forward_step(data: Iterator[_MicroBatch], model: torch.nn.Module) -> tuple[Any, Callable[..., Any]]:
        item = next(data)
        visual_ND = ahead.visual_tokens(item, model)
        return model(item.inputs, objective, item.plan, timers.part, visual_ND), partial(losses_of, item)

    for model in engine.models:
        model.zero_grad_buffer()
    engine.optimizer.zero_grad()
    optimizer = engine.config.optimizer
    rate = learning_rate(optimizer, iteration, engine.config.train.train_iters)
    set_rates(engine.optimizer, rate, optimizer.weight_decay)
    # Between stages the teacher's rows, and what travels, go behind the student's.
    sent = [a + b + sum(c) for a, b, c in zip(rows, teachers, groups, strict=True)]
    with timers.part("student"):
        collected = run_pipeline(engine, items, sent, forward_step, forward_only=False)
    with timers.part("optimizer"):
        grad_norm, applied = apply_gradients(engine.optimizer)
    with timers.part("ema"):
        teacher_move = objective.after_step(applied, iteration, master_shard)
    return StepResult(
        terms=names,
        losses=_reduce_losses(collected, engine),
        counts=counts.terms,
        work=counts.work,
        learning_rate=used_learning_rate(engine.optimizer, engine.topology.device),
        grad_norm=grad_norm,
        applied=applied,
        teacher_move=teacher_move,
    )


def _reduce_losses(collected: list[torch.Tensor], engine: Engine) -> torch.Tensor | None:
    if not engine.topology.on_last_stage:
        return None
    losses = torch.stack(collected).sum(0)
    dist.all_reduce(losses, group=engine.topology.dp_cp_group)
    return losses


def check_teacher_moved(iteration: int, distance: float, momentum: float, student_moved: bool) -> None:
    """Raise `TeacherError` if the teacher stood still at its turn although the student has changed.

    `iteration` counts from 1. The released ZeRO-3 code averages empty shards and never notices; here it stops the run.
    """
    if student_moved and 1.0 - momentum > MIN_EXPECTED_MOVE and distance == 0.0:
        raise TeacherError(
            f"iteration {iteration}: the teacher did not move at momentum {momentum:.4f} although the "
            "student has; its averages are not connected to the optimizer's weights"
        )
