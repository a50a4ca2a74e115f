"""What a step holds, counted over all micro-batches and data-parallel ranks before any forward.

The counts follow from the batches on the host, so one small all-reduce is all that they cost.
"""

from collections.abc import Sequence
from dataclasses import astuple, dataclass

import torch
import torch.distributed as dist

from laver_mcore.accounting.work import StepWork, micro_batch_work
from laver_mcore.data.sequence.batch import Batch
from laver_mcore.device import send
from laver_mcore.model.inputs import num_student_rows, round_up
from laver_mcore.objectives.objective import Plan
from laver_mcore.objectives.similarity import num_similar_images
from laver_mcore.train.engine import Engine
from laver_mcore.train.pipeline import even_rows

LM_LOSS, SIMILARITY = "lm_loss", "visual_similarity"


def terms(engine: Engine) -> tuple[str, ...]:
    """What a step sums up and divides by a count of its own: losses, and the likeness of visual tokens."""
    return (LM_LOSS, *engine.objective.weights, SIMILARITY)


@dataclass(frozen=True, kw_only=True)
class Counts:
    """Over all micro-batches and data-parallel ranks, on the device."""

    terms: torch.Tensor
    """What each of `terms` is divided by, float64."""
    work: torch.Tensor
    """`StepWork` as `WORK` lists it, float64."""


def without_tails(batches: Sequence[Batch], engine: Engine) -> list[Batch]:
    """The batches without whole multiples of padding: packing leaves some at the end of every micro-batch."""
    pad = engine.config.data.pad_to_multiple
    lengths = [
        min(len(batch.tokens_T), round_up(max(1, sum(batch.document_lengths)), pad)) for batch in batches
    ]
    return [batch.trimmed(length) for batch, length in zip(batches, even_rows(lengths, engine), strict=True)]


def student_rows(batches: Sequence[Batch], engine: Engine) -> list[int]:
    """Rows of the student's pass over each micro-batch, padding included."""
    pad, again = engine.config.data.pad_to_multiple, engine.config.objective.reconstructs
    return even_rows([num_student_rows(batch, again, pad) for batch in batches], engine)


def teacher_rows(batches: Sequence[Batch], students: Sequence[int], engine: Engine) -> list[int]:
    """Rows of the teacher's pass, padding included: the image rows of the student's."""
    if engine.teacher is None:
        return [0] * len(batches)
    return [rows - len(batch.tokens_T) for batch, rows in zip(batches, students, strict=True)]


def travelling_rows(batches: Sequence[Batch], engine: Engine) -> list[tuple[int, ...]]:
    """Rows of each group that travels from stage to stage beside the passes, padding included."""
    groups, pad = engine.config.objective.travelling(), engine.config.data.pad_to_multiple
    lengths = even_rows([round_up(len(batch.visual_rows_N), pad) for batch in batches], engine)
    return [(length,) * groups for length in lengths]


def global_counts(
    batches: Sequence[Batch],
    plans: Sequence[Plan],
    students: Sequence[int],
    teachers: Sequence[int],
    engine: Engine,
) -> Counts:
    """One all-reduce; `students` and `teachers` are the rows of their passes over each micro-batch."""
    names = terms(engine)
    sums, work = dict.fromkeys(names, 0), StepWork()
    for batch, plan, student, teacher in zip(batches, plans, students, teachers, strict=True):
        supervised = len(batch.supervised_rows_M)
        similar = num_similar_images(batch.image_lengths)
        found = {LM_LOSS: supervised, **plan.counts, SIMILARITY: similar}
        sums = {name: sums[name] + found[name] for name in names}
        work += micro_batch_work(
            engine.config,
            document_lengths=batch.document_lengths,
            image_grids=batch.image_grids,
            student_rows=student,
            teacher_rows=teacher,
            supervised_rows=supervised,
            masked_rows=plan.masked,
        )
    local = torch.tensor([*sums.values(), *astuple(work)], dtype=torch.float64)
    both = send(local, engine.topology.device)
    dist.all_reduce(both, group=engine.topology.dp_group)
    return Counts(terms=both[: len(names)], work=both[len(names) :])
