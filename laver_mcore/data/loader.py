"""The dialogue data of a training run, in an order that is a pure function of (seed, step).

Epochs follow each other without end; an epoch is a permutation of all samples, packed
into rows of at most seq_length tokens, which are permuted again (packing sorts by length, and steps must
not). A step takes global_batch_size consecutive rows whatever the layout, so `start_step` is all the state
that a resume needs, even one with other data-parallel or micro-batch sizes.
"""

import bisect
import hashlib
import itertools
import logging
import threading
from collections import deque
from collections.abc import Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import numpy as np
from torch import Tensor
from tqdm import tqdm

from laver_mcore.data.batch import Batch, collate
from laver_mcore.data.errors import DataError
from laver_mcore.data.images import DecodedImages, ImageProcessor, image_size
from laver_mcore.data.packing import pack
from laver_mcore.data.prompt import DEFAULT_SYSTEM_PROMPT, EncodedSample, encode_sample
from laver_mcore.data.randomness import permutation
from laver_mcore.data.records import Sample, load_records
from laver_mcore.data.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

_KEPT_TOKENS = 50_000_000  # encoded samples stay in memory up to this many tokens (8 bytes each)
_KEPT_EPOCHS = 2  # a step may straddle two


def image_shares(num_images: int, num_shares: int) -> list[tuple[int, int]]:
    """Cut `range(num_images)` into contiguous shares (start, stop) whose sizes differ by one at most."""
    bounds = [num_images * i // num_shares for i in range(num_shares + 1)]
    return list(itertools.pairwise(bounds))


class DialogueData:
    """Conversations from JSON / JSONL files, tokenised, packed and served step by step.

    Everything is read, tokenised and measured at construction (image headers too, pixels not), so bad data
    raises DataError before training starts. `overlong` says what to do with a sample of more than
    `seq_length` tokens: "error", or "drop" (logged, and counted in `num_dropped`).
    """

    def __init__(
        self,
        source: str | Path | Sequence[str | Path],
        *,
        image_folder: str | Path = ".",
        tokenizer: Tokenizer,
        image_processor: ImageProcessor | None,
        seq_length: int,
        seed: int,
        system_prompt: str = DEFAULT_SYSTEM_PROMPT,
        overlong: Literal["error", "drop"] = "error",
        packing_window: int = 1024,
        image_cache_mib: int = 256,
    ) -> None:
        if overlong not in ("error", "drop"):
            raise DataError(f"overlong={overlong!r}; use 'error' or 'drop'")
        self._sources = [Path(s) for s in ([source] if isinstance(source, str | Path) else source)]
        self._tokenizer = tokenizer
        self._image_processor = image_processor
        self._seq_length = seq_length
        self._seed = seed
        self._system_prompt = system_prompt
        self._overlong = overlong
        self._window = packing_window
        self._images = DecodedImages(max_bytes=image_cache_mib * 2**20)
        self.num_dropped = 0
        self._read(load_records(self._sources, image_folder))
        self._lock = threading.Lock()  # the prefetch thread and the caller share what follows
        self._epochs: dict[int, list[list[int]]] = {}
        self._first_row = [0]  # first row of epoch 0, 1, ... as far as known

    def _read(self, samples: list[Sample]) -> None:
        self.samples: list[Sample] = []
        self._grids: list[tuple[tuple[int, int], ...]] = []
        self._kept: list[EncodedSample | None] = []
        lengths: list[int] = []
        num_tokens = 0
        for sample in tqdm(samples, desc="tokenising", unit=" samples", delay=2.0, disable=None):
            grids = self._sample_grids(sample)
            encoded = self._encode(sample, grids)
            if len(encoded) > self._seq_length:
                if self._overlong == "error":
                    raise DataError(
                        f"sample {sample.key!r} has {len(encoded)} tokens, more than "
                        f"seq_length={self._seq_length}; raise seq_length to {len(encoded)} or set "
                        "overlong to 'drop'"
                    )
                self.num_dropped += 1
                continue
            num_tokens += len(encoded)
            self.samples.append(sample)
            self._grids.append(grids)
            self._kept.append(encoded if num_tokens <= _KEPT_TOKENS else None)
            lengths.append(len(encoded))
        if self.num_dropped:
            logger.warning(
                "dropped %d of %d samples longer than seq_length=%d",
                self.num_dropped,
                len(samples),
                self._seq_length,
            )
        if not lengths:
            raise DataError(f"every sample is longer than seq_length={self._seq_length}; raise it")
        self.lengths = np.array(lengths, dtype=np.int64)

    def rows_per_epoch(self, epoch: int) -> int:
        """Packed rows in an epoch; it varies a little, because every epoch is packed anew."""
        with self._lock:
            return len(self._epoch_rows(epoch))

    def row(self, index: int) -> list[int]:
        """The samples (indices into `samples`) of one row of the endless concatenation of epochs."""
        with self._lock:
            while index >= self._first_row[-1]:
                epoch = len(self._first_row) - 1
                self._first_row.append(self._first_row[-1] + len(self._epoch_rows(epoch)))
            epoch = bisect.bisect_right(self._first_row, index) - 1
            return self._epoch_rows(epoch)[index - self._first_row[epoch]]

    def step_batches(
        self,
        step: int,
        *,
        global_batch_size: int,
        micro_batch_size: int,
        dp_rank: int = 0,
        dp_size: int = 1,
        image_share: tuple[int, int] | None = None,
    ) -> list[Batch]:
        """The micro-batches of one data-parallel rank at `step`, counted from 0.

        Step k takes rows [k * G, (k + 1) * G), G = `global_batch_size` packed rows; micro-batch m of rank d
        takes the `micro_batch_size` rows from k * G + (m * dp_size + d) * micro_batch_size. `image_share` =
        (i, n) decodes the i-th of n shares of each micro-batch's images (`image_shares`); None decodes none.
        """
        rows_per_micro_batch = micro_batch_size * dp_size
        if global_batch_size % rows_per_micro_batch:
            raise DataError(
                f"global_batch_size={global_batch_size} is not divisible by micro_batch_size * data-parallel "
                f"size = {micro_batch_size} * {dp_size}; use a multiple of {rows_per_micro_batch}"
            )
        first = step * global_batch_size + dp_rank * micro_batch_size
        starts = range(first, (step + 1) * global_batch_size, rows_per_micro_batch)
        return [self._micro_batch(start, micro_batch_size, image_share) for start in starts]

    def iterate(
        self,
        start_step: int,
        end_step: int,
        *,
        global_batch_size: int,
        micro_batch_size: int,
        dp_rank: int = 0,
        dp_size: int = 1,
        image_share: tuple[int, int] | None = None,
        prefetch_steps: int = 2,
    ) -> Generator[list[Batch], None, None]:
        """Yield `step_batches` for steps [start_step, end_step), prepared `prefetch_steps` ahead in a thread.

        An error in the thread is raised at the step that it belongs to. Closing the generator, or leaving
        the loop over it, ends the thread.
        """
        pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="laver-data")
        pending: deque[Future[list[Batch]]] = deque()
        steps = iter(range(start_step, end_step))

        def submit(num_steps: int) -> None:
            for step in itertools.islice(steps, num_steps):
                pending.append(
                    pool.submit(
                        self.step_batches,
                        step,
                        global_batch_size=global_batch_size,
                        micro_batch_size=micro_batch_size,
                        dp_rank=dp_rank,
                        dp_size=dp_size,
                        image_share=image_share,
                    )
                )

        try:
            submit(prefetch_steps + 1)
            while pending:
                batches = pending.popleft().result()
                yield batches
                submit(1)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def fingerprint(self) -> str:
        """Hex digest of what decides the batches: records, seed, lengths, tokenizer, image processor.

        The image files' own bytes are not read for it.
        """
        digest = hashlib.blake2b(digest_size=16)
        for path in self._sources:
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "blake2b").digest())
        processor = self._image_processor.fingerprint() if self._image_processor else None
        settings = (self._seed, self._seq_length, self._system_prompt, self._overlong, self._window)
        digest.update(repr((settings, len(self.samples), self._tokenizer.fingerprint(), processor)).encode())
        return digest.hexdigest()

    def _epoch_rows(self, epoch: int) -> list[list[int]]:
        if epoch not in self._epochs:
            order = permutation(len(self.samples), "epoch", self._seed, epoch)
            bins = pack(self.lengths[order], self._seq_length, window=self._window)
            shuffled = permutation(len(bins), "rows", self._seed, epoch)
            while len(self._epochs) >= _KEPT_EPOCHS:
                del self._epochs[next(iter(self._epochs))]
            self._epochs[epoch] = [order[bins[index]].tolist() for index in shuffled]
        return self._epochs[epoch]

    def _micro_batch(self, first_row: int, num_rows: int, image_share: tuple[int, int] | None) -> Batch:
        members = [index for row in range(first_row, first_row + num_rows) for index in self.row(row)]
        return collate(
            [self._kept[i] or self._encode(self.samples[i], self._grids[i]) for i in members],
            [self.samples[i].key for i in members],
            total_length=num_rows * self._seq_length,
            pad_id=self._tokenizer.special.pad,
            pixels=self._pixels([path for i in members for path in self.samples[i].images], image_share),
        )

    def _pixels(self, paths: list[Path], image_share: tuple[int, int] | None) -> Tensor | None:
        if image_share is None or self._image_processor is None:
            return None
        index, num_shares = image_share
        start, stop = image_shares(len(paths), num_shares)[index]
        return self._image_processor([self._images.open(path) for path in paths[start:stop]])

    def _encode(self, sample: Sample, grids: tuple[tuple[int, int], ...]) -> EncodedSample:
        return encode_sample(sample.turns, grids, self._tokenizer, system_prompt=self._system_prompt)

    def _sample_grids(self, sample: Sample) -> tuple[tuple[int, int], ...]:
        if not sample.images:
            return ()
        if self._image_processor is None:
            raise DataError(f"sample {sample.key!r} has images but there is no image processor; give one")
        return tuple(self._image_processor.grid(*image_size(path)) for path in sample.images)
