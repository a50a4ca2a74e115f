"""Which samples a step holds and which of them are this rank's; their tokens and pixels -> micro-batches."""

from dataclasses import dataclass, replace

import torch

from laver_mcore.data.errors import DataError
from laver_mcore.data.order.balance import assign_rows, image_shares
from laver_mcore.data.order.dialogues import Dialogues
from laver_mcore.data.order.rows import RowOrder
from laver_mcore.data.sequence.batch import Batch, collate
from laver_mcore.data.serve.assemble import ImageTask, ReadImages, ReadTask, TokenizedSamples, blank


@dataclass(frozen=True, kw_only=True)
class StepLayout:
    """Which rows of a step are this rank's, and which of their images it decodes.

    `image_share` = (i, n): the i-th of n shares of each micro-batch's images; None: none.
    """

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


class StepPlan:
    """What is to be done for any step; depends on the step and the layout alone."""

    def __init__(
        self, dialogues: Dialogues, order: RowOrder, layout: StepLayout, *, seq_length: int, pixels: bool
    ) -> None:
        layout.check()  # before any process starts
        self._dialogues, self._order, self._layout = dialogues, order, layout
        self._seq_length = seq_length
        self.decodes = pixels and layout.image_share is not None

    def rows(self, step: int) -> list[list[list[int]]]:
        """The rows of a step as [data-parallel rank][micro-batch][row], even in cost."""
        layout, all_rows = self._layout, self._rows(step)
        costs = [self._order.row_cost(row) for row in all_rows]
        assigned = assign_rows(costs, dp_size=layout.dp_size, micro_batch_size=layout.micro_batch_size)
        return [[[all_rows[row] for row in rows] for rows in of_rank] for of_rank in assigned]

    def num_samples(self, step: int) -> int:
        """Of all ranks."""
        return sum(len(self._order.row(row)) for row in self._rows(step))

    def reads(self, step: int) -> list[ReadTask]:
        """One task for each of this rank's micro-batches."""
        return [
            ReadTask(members=tuple(number for row in rows for number in self._order.row(row)))
            for rows in self.rows(step)[self._layout.dp_rank]
        ]

    def images(self, read: ReadTask, texts: TokenizedSamples) -> ImageTask:
        """This rank's share of a micro-batch's images; none where the layout says none."""
        owned = [
            (image, number)
            for number, sample in zip(read.members, texts.samples, strict=True)
            for image in sample.images
        ]
        start = stop = 0
        if self.decodes:
            assert self._layout.image_share is not None
            index, num_shares = self._layout.image_share
            spans = [span for sample in texts.samples for span in sample.encoded.image_spans]
            start, stop = image_shares([(span.height, span.width) for span in spans], num_shares)[index]
        owned = owned[start:stop]
        return ImageTask(images=tuple(i for i, _ in owned), owners=tuple(number for _, number in owned))

    def silence(self, read: ReadTask, texts: TokenizedSamples, failed: frozenset[int]) -> TokenizedSamples:
        """The micro-batch with these samples blank, in their places."""
        samples = [
            blank(self._dialogues, number) if number in failed else sample
            for number, sample in zip(read.members, texts.samples, strict=True)
        ]
        return replace(texts, samples=tuple(samples), failures={})

    def collate(self, texts: TokenizedSamples, pictures: ReadImages | None) -> Batch:
        """The micro-batch; `pictures` hold pixels, or there are none."""
        pixels, targets = (None, None) if pictures is None else (pictures.pixels, pictures.targets)
        return collate(
            [sample.encoded for sample in texts.samples],
            [sample.key for sample in texts.samples],
            total_length=self._layout.micro_batch_size * self._seq_length,
            pad_id=self._dialogues.pad_id,
            pixels=None if pixels is None else torch.as_tensor(pixels),
            targets=None if targets is None else torch.as_tensor(targets),
        )

    def _rows(self, step: int) -> range:
        first = step * self._layout.global_batch_size
        return range(first, first + self._layout.global_batch_size)
