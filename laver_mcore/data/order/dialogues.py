"""All usable samples of a run, from one set or several: lengths known, content read when asked for."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial

import numpy as np

from laver_mcore.data.errors import DataError
from laver_mcore.data.images.processors import ImageProcessor
from laver_mcore.data.images.wanted import WantedImage
from laver_mcore.data.order.index import SourceIndex
from laver_mcore.data.order.truncate import Cut, longest_beginning
from laver_mcore.data.records.sample import Sample
from laver_mcore.data.sequence.prompt import EncodedSample, encode_sample
from laver_mcore.data.sequence.tokenizer import Tokenizer

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class DialogueSample:
    """One sample as tokens, with what is needed to read its images."""

    key: str
    encoded: EncodedSample
    images: tuple[WantedImage, ...]


class Dialogues(Sequence[Sample]):
    """Samples of several indexed sources, numbered through; those longer than `seq_length` are left out.

    `overlong` is "error", "drop", or "truncate" (whole turns from the end, counted in `num_cut`). `set_starts`
    [sets + 1] are the numbers at which each set begins and ends. `lengths`, `visual` and `visual_squares` (int64
    [samples]) are the tokens of each sample, those of its images, and the sum of the squares of its images' tokens.
    """

    def __init__(
        self,
        indexes: Sequence[SourceIndex],
        *,
        tokenizer: Tokenizer,
        image_processor: ImageProcessor | None,
        system_prompt: str,
        seq_length: int,
        overlong: str,
    ) -> None:
        if overlong not in ("error", "drop", "truncate"):
            raise DataError(f"overlong={overlong!r}; use 'error', 'drop' or 'truncate'")
        self.indexes = list(indexes)
        self._tokenizer = tokenizer
        self.pad_id = tokenizer.special.pad
        self._processor = image_processor
        self._system_prompt = system_prompt
        self.num_dropped = self.num_cut = 0
        self._cuts: list[dict[int, Cut]] = []
        members, lengths, visual, squares = [], [], [], []
        for index in indexes:
            visual_n, squares_n = self._visual(index)
            of_set = index.text_lengths.astype(np.int64) + visual_n
            fits = of_set <= seq_length
            if overlong == "error" and not fits.all():
                self._refuse(index, of_set, seq_length)
            cuts = self._cut(index, np.flatnonzero(~fits), seq_length) if overlong == "truncate" else {}
            for local, cut in cuts.items():
                tokens = [rows * columns for rows, columns in self._grids(index, local, cut.num_images)]
                of_set[local], visual_n[local] = cut.length, sum(tokens)
                squares_n[local] = sum(number**2 for number in tokens)
                fits[local] = True
            self._cuts.append(cuts)
            self.num_cut += len(cuts)
            self.num_dropped += int((~fits).sum())
            members.append(np.flatnonzero(fits))
            lengths.append(of_set[fits])
            visual.append(visual_n[fits])
            squares.append(squares_n[fits])
        self.set_starts = np.cumsum([0, *map(len, members)])
        self._members = np.concatenate(members)
        self.lengths = np.concatenate(lengths)
        self.visual, self.visual_squares = np.concatenate(visual), np.concatenate(squares)
        if self.num_dropped:
            total = self.num_dropped + len(self)
            logger.warning(
                "dropped %d of %d samples longer than seq_length=%d", self.num_dropped, total, seq_length
            )
        if self.num_cut:
            logger.warning(
                "cut %d of %d samples longer than seq_length=%d behind their last answer that fits",
                self.num_cut,
                self.num_dropped + len(self),
                seq_length,
            )
        if not len(self):
            raise DataError(f"every sample is longer than seq_length={seq_length}; raise it")

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, number):  # type: ignore[no-untyped-def]
        """Read sample `number`, its key unique over all sets."""
        if not -len(self) <= number < len(self):
            raise IndexError(number)
        return self._read(*self._locate(number % len(self)))

    def key(self, number: int) -> str:
        """The key of a sample; with several sets the set's number stands in front."""
        return self._key(*self._locate(number % len(self)))

    def _read(self, which: int, local: int) -> Sample:
        sample = self.indexes[which].sample(local)
        if cut := self._cuts[which].get(local):
            sample = cut.of(sample)
        return replace(sample, key=self._key(which, local))

    def _key(self, which: int, local: int) -> str:
        key = self.indexes[which].key(local)
        return key if len(self.indexes) == 1 else f"{which}/{key}"

    def read(self, number: int) -> DialogueSample:
        """Read and tokenise one sample; DataError when the data has changed since it was indexed."""
        which, local = self._locate(number)
        index, sample = self.indexes[which], self._read(which, local)
        sizes = self._sizes(index, local)[: len(sample.images)]
        encoded = self._encode(index, local, sample)
        if len(encoded) != self.lengths[number]:
            raise DataError(
                f"sample {sample.key!r} has {len(encoded)} tokens, had {self.lengths[number]} when it was "
                "indexed; delete the index"
            )
        images = [WantedImage(source, *size) for source, size in zip(sample.images, sizes, strict=True)]
        return DialogueSample(sample.key, encoded, tuple(images))

    def _encode(self, index: SourceIndex, local: int, sample: Sample) -> EncodedSample:
        grids = self._grids(index, local, len(sample.images))
        return encode_sample(sample.turns, grids, self._tokenizer, system_prompt=self._system_prompt)

    def _cut(self, index: SourceIndex, overlong: np.ndarray, seq_length: int) -> dict[int, Cut]:
        """What is kept of those samples of a source that are too long, by their numbers there."""
        found = {}
        for local in map(int, overlong):
            encoder = partial(self._encode, index, local)
            cut = longest_beginning(index.sample(local), seq_length, encoder)
            if cut is not None:
                found[local] = cut
        return found

    def _locate(self, number: int) -> tuple[int, int]:
        return int(np.searchsorted(self.set_starts, number, side="right")) - 1, int(self._members[number])

    @staticmethod
    def _sizes(index: SourceIndex, local: int) -> list[tuple[int, int]]:
        start, stop = index.image_starts[local : local + 2]
        return [(int(width), int(height)) for width, height in index.image_sizes[start:stop]]

    def _grids(self, index: SourceIndex, local: int, num_images: int) -> list[tuple[int, int]]:
        return [self._grid(width, height) for width, height in self._sizes(index, local)[:num_images]]

    def _grid(self, width: int, height: int) -> tuple[int, int]:
        assert self._processor is not None
        return self._processor.grid(width, height)

    def _visual(self, index: SourceIndex) -> tuple[np.ndarray, np.ndarray]:
        """Visual tokens of every sample of a source, and the sum of the squares of its images' tokens, int64 [n].

        Too many for any row if an image is refused.
        """
        if len(index.image_sizes) and self._processor is None:
            first = int(np.argmax(np.diff(index.image_starts) > 0))
            raise DataError(
                f"sample {index.key(first)!r} has images but there is no image processor; give one"
            )
        sizes_U2, which_I = np.unique(index.image_sizes, axis=0, return_inverse=True)
        tokens_U = np.array([self._num_tokens(int(w), int(h)) for w, h in sizes_U2], dtype=np.int64)
        tokens_I = tokens_U[which_I.reshape(-1)]
        before_2I = np.concatenate(
            [np.zeros((2, 1), dtype=np.int64), np.cumsum([tokens_I, tokens_I**2], axis=1)], 1
        )
        visual, squares = before_2I[:, index.image_starts[1:]] - before_2I[:, index.image_starts[:-1]]
        return visual, squares

    @lru_cache  # noqa: B019 - one instance a run, and few sizes
    def _num_tokens(self, width: int, height: int) -> int:
        try:
            rows, columns = self._grid(width, height)
        except DataError:
            return 2**30  # a shape without a grid: dropped, or refused, with the samples that are too long
        return rows * columns

    def _refuse(self, index: SourceIndex, lengths: np.ndarray, seq_length: int) -> None:
        local = int(np.argmax(lengths > seq_length))
        for size in self._sizes(index, local):
            self._grid(*size)  # names a shape without a grid
        raise DataError(
            f"sample {index.key(local)!r} has {lengths[local]} tokens, more than seq_length={seq_length}; "
            f"raise seq_length to {lengths.max()} or set overlong to 'drop' or 'truncate'"
        )
