"""One step's rows -> this rank's micro-batches, samples whose images fail silenced."""

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace

import torch

from laver_mcore.data.assemble import Assembled, Plan, assemble, with_pixels
from laver_mcore.data.balance import assign_rows
from laver_mcore.data.batch import Batch, collate
from laver_mcore.data.dialogues import Dialogues
from laver_mcore.data.errors import DataError
from laver_mcore.data.image_backend import PixelMaker
from laver_mcore.data.order import RowOrder
from laver_mcore.data.quarantine import Quarantine
from laver_mcore.data.workers import WorkerPool


@dataclass(frozen=True, kw_only=True)
class StepLayout:
    """Which rows of a step are this rank's, and which of their images it decodes."""

    global_batch_size: int
    micro_batch_size: int
    dp_rank: int = 0
    dp_size: int = 1
    image_share: tuple[int, int] | None = None

    def check(self) -> None:
        """DataError for sizes that do not divide."""
        rows = self.micro_batch_size * self.dp_size
        if self.global_batch_size % rows:
            raise DataError(
                f"global_batch_size={self.global_batch_size} is not divisible by micro_batch_size * "
                f"data-parallel size = {self.micro_batch_size} * {self.dp_size}; use a multiple of {rows}"
            )


class StepMaker:
    """Makes the micro-batches of any step; what it returns depends on the step and the layout alone."""

    def __init__(
        self,
        dialogues: Dialogues,
        order: RowOrder,
        make_pixels: PixelMaker | None,
        quarantine: Quarantine,
        *,
        seq_length: int,
        pad_id: int,
    ) -> None:
        self._dialogues, self._order, self._make_pixels = dialogues, order, make_pixels
        self._quarantine = quarantine
        self._seq_length, self._pad_id = seq_length, pad_id

    def rows(self, step: int, layout: StepLayout) -> list[list[list[int]]]:
        """The rows of a step as [data-parallel rank][micro-batch][row], even in cost."""
        layout.check()
        first = step * layout.global_batch_size
        costs = [self._order.row_cost(first + row) for row in range(layout.global_batch_size)]
        assigned = assign_rows(costs, dp_size=layout.dp_size, micro_batch_size=layout.micro_batch_size)
        return [[[first + row for row in rows] for rows in of_rank] for of_rank in assigned]

    def plans(self, step: int, layout: StepLayout, silenced: frozenset[int] = frozenset()) -> list[Plan]:
        """One plan a micro-batch."""
        share = layout.image_share if self._make_pixels is not None else None
        plans = []
        for rows in self.rows(step, layout)[layout.dp_rank]:
            members = tuple(number for row in rows for number in self._order.row(row))
            plans.append(Plan(members=members, image_share=share, silenced=silenced.intersection(members)))
        return plans

    def make(
        self,
        plans: Sequence[Plan],
        layout: StepLayout,
        *,
        pool: WorkerPool | None = None,
        submitted: "Sequence[Future[Assembled]] | None" = None,
    ) -> tuple[list[Batch], frozenset[int]]:
        """The micro-batches of `plans`, and the samples that are silenced in them.

        An image that fails silences its sample: the micro-batch is made again without it. `submitted` are
        answers that workers of `pool` are preparing.
        """
        parts = [
            self._finish(plan, submitted[number].result() if submitted else self._assemble(plan, pool))
            for number, plan in enumerate(plans)
        ]
        plans = list(plans)
        while failures := {number: why for part in parts for number, why in part.failures.items()}:
            for number, why in failures.items():
                self._quarantine.add_failure(self._dialogues.key(number), why)
            for position, plan in enumerate(plans):
                failed = failures.keys() & set(plan.members)
                if failed:
                    plans[position] = plan = replace(plan, silenced=plan.silenced | failed)
                    parts[position] = self._finish(plan, self._assemble(plan, pool))
        self._quarantine.saw(sum(len(plan.members) for plan in plans))
        batches = [self._collate(part, layout) for part in parts]
        return batches, frozenset().union(*(plan.silenced for plan in plans))

    def _assemble(self, plan: Plan, pool: WorkerPool | None) -> Assembled:
        return assemble(self._dialogues, plan) if pool is None else pool.submit(plan).result()

    def _finish(self, plan: Plan, part: Assembled) -> Assembled:
        """Pixels, where a worker has not made them already.

        Images whose bytes failed stay out of the decoder.
        """
        if plan.image_share is None or part.pixels is not None or part.failures:
            return part
        assert self._make_pixels is not None
        return with_pixels(part, self._make_pixels)

    def _collate(self, part: Assembled, layout: StepLayout) -> Batch:
        return collate(
            part.encoded,
            part.keys,
            total_length=layout.micro_batch_size * self._seq_length,
            pad_id=self._pad_id,
            pixels=None if part.pixels is None else torch.from_numpy(part.pixels),
        )
