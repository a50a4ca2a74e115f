"""What one micro-batch hands to the model.

Shapes: T = micro_batch_size * seq_length tokens (fewer once trimmed), M = supervised tokens, N = visual tokens of all
images, I = images. Documents lie back to back from token 0; the padding is the tail.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from laver_mcore.data.errors import DataError
from laver_mcore.data.sequence.layout import SequenceLayout, concatenate, dialogue_layout, trim
from laver_mcore.data.sequence.prompt import IGNORE, EncodedSample


@dataclass(frozen=True, kw_only=True, eq=False)
class Batch:
    """One micro-batch, flattened to one sequence."""

    tokens_T: Tensor  # int64; <|image_pad|> at visual tokens, the padding id in the tail
    labels_T: Tensor  # int64 next-token ids, -100 where nothing is learned
    layout: SequenceLayout  # positions and mask of the T dialogue tokens
    supervised_rows_M: Tensor  # int64, ascending: where labels_T != -100
    visual_rows_N: Tensor  # int64, ascending: where the visual tokens are, image by image, row by row
    image_grids: tuple[tuple[int, int], ...]  # I x (height, width) in tokens, in the order of visual_rows_N
    image_keys: tuple[tuple[str, int], ...]  # I x (sample key, index of the image in its sample)
    sample_keys: tuple[str, ...]  # of every sample, in order
    document_lengths: tuple[int, ...]  # tokens of each sample, in order; their sum is the unpadded length
    pixels: Tensor | None = None  # the tower's input for the share of the images that was asked for
    targets: Tensor | None = None  # of the same images: pixels for a frozen encoder, or its features

    @property
    def num_samples(self) -> int:
        return len(self.document_lengths)

    @property
    def num_images(self) -> int:
        return len(self.image_grids)

    @property
    def image_lengths(self) -> tuple[int, ...]:
        """Visual tokens of every image."""
        return tuple(h * w for h, w in self.image_grids)

    def trimmed(self, length: int) -> "Batch":
        """The same batch without the padding behind its first `length` tokens, which hold all documents."""
        if sum(self.document_lengths) > length:
            raise ValueError(f"length={length} cuts documents of {sum(self.document_lengths)} tokens")
        return replace(
            self,
            tokens_T=self.tokens_T[:length],
            labels_T=self.labels_T[:length],
            layout=trim(self.layout, length),
        )

    def tensors(self) -> dict[str, Tensor]:
        """All tensors but those of the layout, by field."""
        names = ("tokens_T", "labels_T", "supervised_rows_M", "visual_rows_N", "pixels", "targets")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}


def collate(
    samples: Sequence[EncodedSample],
    keys: Sequence[str],
    *,
    total_length: int,
    pad_id: int,
    pixels: Tensor | None = None,
    targets: Tensor | None = None,
) -> Batch:
    """Lay encoded samples (or prompts) back to back into one sequence of `total_length` tokens."""
    lengths = [len(sample) for sample in samples]
    if sum(lengths) > total_length:
        raise DataError(
            f"{len(samples)} samples hold {sum(lengths)} tokens; the sequence holds {total_length}"
        )
    tokens_T = np.full(total_length, pad_id, dtype=np.int64)
    labels_T = np.full(total_length, IGNORE, dtype=np.int64)
    visual_rows: list[np.ndarray] = []
    start = 0
    for sample, length in zip(samples, lengths, strict=True):
        tokens_T[start : start + length] = sample.token_ids_L
        labels_T[start : start + length] = sample.labels_L
        visual_rows.extend(np.arange(start + span.start, start + span.stop) for span in sample.image_spans)
        start += length
    visual_rows_N = np.concatenate([np.empty(0, dtype=np.int64), *visual_rows])
    return Batch(
        tokens_T=torch.from_numpy(tokens_T),
        labels_T=torch.from_numpy(labels_T),
        layout=concatenate([dialogue_layout([sample.segments() for sample in samples])], total_length),
        supervised_rows_M=torch.from_numpy(np.flatnonzero(labels_T != IGNORE)),
        visual_rows_N=torch.from_numpy(visual_rows_N),
        image_grids=tuple((span.height, span.width) for sample in samples for span in sample.image_spans),
        image_keys=tuple(
            (key, index)
            for key, sample in zip(keys, samples, strict=True)
            for index in range(len(sample.image_spans))
        ),
        sample_keys=tuple(keys),
        document_lengths=tuple(lengths),
        pixels=pixels,
        targets=targets,
    )
