"""What a step holds, counted over all micro-batches and data-parallel ranks before any forward.

The counts follow from the batches on the host, so one small all-reduce is all that they cost.
"""

from collections.abc import Sequence
from dataclasses import astuple

import numpy as np
import torch
import torch.distributed as dist

from laver_mcore.accounting.work import WORK, StepWork, micro_batch_work
from laver_mcore.data.sequence.batch import Batch
from laver_mcore.device import send
from laver_mcore.model.inputs import num_student_rows, round_up
from laver_mcore.objectives.gram import num_gram_matrices
from laver_mcore.objectives.similarity import num_similar_images
from laver_mcore.train.engine import Engine
from laver_mcore.train.pipeline import even_rows

DIVISORS = ("supervised", "masked", "gram_matrices", "similar_images")
"""What each loss is divided by, in the order of the losses."""
COUNTS = (*DIVISORS, *WORK)


def image_lengths(batch: Batch) -> tuple[int, ...]:
    """Visual tokens of every image."""
    return tuple(h * w for h, w in batch.image_grids)


def without_tails(batches: Sequence[Batch], engine: Engine) -> list[Batch]:
    """The batches without whole multiples of padding: packing leaves some at the end of every micro-batch."""
    pad = engine.config.data.pad_to_multiple
    lengths = [
        min(len(batch.tokens_T), round_up(max(1, sum(batch.document_lengths)), pad)) for batch in batches
    ]
    return [batch.trimmed(length) for batch, length in zip(batches, even_rows(lengths, engine), strict=True)]


def student_rows(batches: Sequence[Batch], engine: Engine) -> list[int]:
    """Rows of the student's pass over each micro-batch, padding included."""
    pad, laver = engine.config.data.pad_to_multiple, engine.config.laver.laver
    return even_rows([num_student_rows(batch, laver, pad) for batch in batches], engine)


def teacher_rows(batches: Sequence[Batch], students: Sequence[int], engine: Engine) -> list[int]:
    """Rows of the teacher's pass, padding included: the reconstruction part of the student's."""
    if engine.teacher is None:
        return [0] * len(batches)
    return [rows - len(batch.tokens_T) for batch, rows in zip(batches, students, strict=True)]


def global_counts(
    batches: Sequence[Batch],
    masks: Sequence[np.ndarray | None],
    students: Sequence[int],
    teachers: Sequence[int],
    engine: Engine,
) -> torch.Tensor:
    """`COUNTS` summed over micro-batches and data-parallel ranks, float64 on the device.

    `students` and `teachers` are the rows of their passes over each micro-batch.
    """
    config = engine.config
    divisors, work = np.zeros(len(DIVISORS)), StepWork()
    for batch, mask, student, teacher in zip(batches, masks, students, teachers, strict=True):
        lengths = image_lengths(batch)
        supervised, masked = len(batch.supervised_rows_M), 0 if mask is None else int(mask.sum())
        scope = config.laver.gram_scope
        divisors += (supervised, masked, num_gram_matrices(lengths, scope), num_similar_images(lengths))
        work += micro_batch_work(
            config,
            document_lengths=batch.document_lengths,
            image_grids=batch.image_grids,
            student_rows=student,
            teacher_rows=teacher,
            supervised_rows=supervised,
            masked_rows=masked,
        )
    local = torch.tensor([*divisors, *astuple(work)], dtype=torch.float64)
    counts = send(local, engine.topology.device)
    dist.all_reduce(counts, group=engine.topology.dp_group)
    return counts


def work_of(counts: Sequence[float]) -> StepWork:
    """The work in a list of `COUNTS`."""
    return StepWork.of(counts[len(DIVISORS) :])
