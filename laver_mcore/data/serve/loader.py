"""The dialogue data of a training run, step by step, in an order that is a pure function of (seed, step).

    records/     order/index.py   order/dialogues.py  order/rows.py  steps.py  assemble.py  images/   sequence/batch.py
    a record  -> measured      -> numbered         -> rows        -> tasks  -> tokens    -> pixels -> Batch

A step takes global_batch_size consecutive rows whatever the layout, so `start_step` is all the state that a
resume needs, even one with other data-parallel or micro-batch sizes, or another number of workers.
"""

import hashlib
import time
from collections.abc import Generator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Literal

import torch

from laver_mcore.data.errors import DataError
from laver_mcore.data.images.backends import make_backend
from laver_mcore.data.images.decode import DecodedImages
from laver_mcore.data.images.processors import ImageProcessor
from laver_mcore.data.images.target_pixels import TargetSource
from laver_mcore.data.images.wanted import PixelMaker
from laver_mcore.data.order.cost import PackingCost
from laver_mcore.data.order.dialogues import Dialogues
from laver_mcore.data.order.index import FOLDER, get_index
from laver_mcore.data.order.rows import RowOrder
from laver_mcore.data.records.finevision import RatingFilter
from laver_mcore.data.records.sources import open_source
from laver_mcore.data.sequence.batch import Batch
from laver_mcore.data.sequence.prompt import DEFAULT_SYSTEM_PROMPT
from laver_mcore.data.sequence.tokenizer import Tokenizer
from laver_mcore.data.serve.ahead import Ahead, StepMaker
from laver_mcore.data.serve.assemble import Readers
from laver_mcore.data.serve.device_copies import DeviceCopies
from laver_mcore.data.serve.exchange import Alone, Exchange
from laver_mcore.data.serve.quarantine import Quarantine
from laver_mcore.data.serve.steps import StepLayout, StepPlan
from laver_mcore.data.serve.workers import Inline, Runner, WorkerPool, WorkerSetup


class DialogueData:
    """Conversations from JSON, parquet or prepared shards, packed and served step by step.

    Every sample is measured at construction, or was before (`index.py`). Samples that cannot be used are
    listed in `quarantine` and left out, as long as they are no more than `max_bad_fraction` of a set; an
    image that fails later silences its sample. `overlong` says what to do with a sample of more than
    `seq_length` tokens: "error", "drop" or "truncate" (logged, counted in `num_dropped` and `num_cut`).
    `weights`, one a source, mix several sets (`order/rows.py`). `cost` makes rows and ranks even in what they
    cost to train on; without it samples are packed by length alone. `num_workers` processes read ahead; 0 reads
    in a thread. `image_backend` is one of `image_backend.BACKENDS`; `targets` are made of the same images
    besides. With a CUDA `device`, `iterate` yields batches that are there already.
    """

    def __init__(
        self,
        source: str | Path | Sequence[str | Path],
        *,
        image_folder: str | Path | None = None,
        allow_outside_images: bool = False,
        tokenizer: Tokenizer,
        image_processor: ImageProcessor | None,
        targets: TargetSource | None = None,
        seq_length: int,
        seed: int,
        system_prompt: str = DEFAULT_SYSTEM_PROMPT,
        overlong: Literal["error", "drop", "truncate"] = "error",
        weights: Sequence[float] | None = None,
        ratings: RatingFilter | None = None,
        packing_window: int = 1024,
        cost: PackingCost | None = None,
        image_backend: str = "pillow",
        image_cache_mib: int = 256,
        num_workers: int = 0,
        worker_timeout: float = 30.0,
        decode_threads: int = 2,
        max_bad_fraction: float = 0.1,
        quarantine: Path | None = None,
        index_folder: Path | None = None,
        device: torch.device | None = None,
    ) -> None:
        paths = [Path(s) for s in ([source] if isinstance(source, str | Path) else source)]
        if not paths:
            raise DataError("the list of data files: holds no records")
        self._image_processor, self._targets, self._num_workers = image_processor, targets, num_workers
        quarantined = Quarantine(quarantine, max_bad_fraction)
        self._sources = [
            open_source(path, image_folder or path.parent, ratings, allow_outside_images=allow_outside_images)
            for path in paths
        ]
        indexes = []
        for path, opened in zip(paths, self._sources, strict=True):
            folder = index_folder or (path if path.is_dir() else path.parent) / FOLDER
            index = get_index(opened, tokenizer, system_prompt, num_workers=num_workers, folder=folder)
            quarantined.add_unusable(index.bad, len(index) + len(index.bad))
            indexes.append(index)
        self.samples = Dialogues(
            indexes,
            tokenizer=tokenizer,
            image_processor=image_processor,
            system_prompt=system_prompt,
            seq_length=seq_length,
            overlong=overlong,
        )
        self.lengths = self.samples.lengths
        self.num_dropped, self.num_cut = self.samples.num_dropped, self.samples.num_cut
        self._order = RowOrder(
            self.lengths,
            seq_length=seq_length,
            seed=seed,
            window=packing_window,
            set_starts=self.samples.set_starts,
            weights=weights,
            costs=None
            if cost is None
            else cost.documents(self.lengths, self.samples.visual, self.samples.visual_squares),
        )
        decoded = DecodedImages(max_bytes=image_cache_mib * 2**20)
        self._make_pixels: PixelMaker | None = None
        if image_processor is not None:
            self._make_pixels = make_backend(
                image_backend, image_processor, num_threads=decode_threads, decoded=decoded, device=device
            )
        self._make_targets = None if targets is None else targets.maker(decoded)
        self._task = WorkerSetup(
            dialogues=self.samples,
            image_processor=image_processor,
            targets=targets,
            decode=image_backend == "pillow",
        )
        self._quarantine, self._seq_length, self._worker_timeout = quarantined, seq_length, worker_timeout
        self._copies = DeviceCopies(device) if device is not None and device.type == "cuda" else None
        self._waits: list[float] = []
        settings = (seed, seq_length, system_prompt, overlong, packing_window, tuple(weights or ()), cost)
        self._fingerprint = repr((settings, image_backend, len(self.samples), tokenizer.fingerprint()))

    def rows_per_epoch(self, epoch: int) -> int:
        """Packed rows in an epoch; it varies a little, because every epoch is packed anew."""
        return self._order.rows_per_epoch(epoch)

    def samples_per_epoch(self, epoch: int) -> int:
        """Dialogues in an epoch; with weights, some of them more than once."""
        return self._order.samples_per_epoch(epoch)

    def row(self, index: int) -> list[int]:
        """The samples (indices into `samples`) of one row of the endless concatenation of epochs."""
        return self._order.row(index)

    def row_cost(self, index: int) -> int:
        """What a row costs to train on, in tokens' worth of the decoder's matrices (`cost.py`)."""
        return self._order.row_cost(index)

    def step_rows(self, step: int, **layout: Any) -> list[list[list[int]]]:
        """The rows of a step as [data-parallel rank][micro-batch][row]; `layout` as in `step_batches`."""
        return self._plan(StepLayout(**layout)).rows(step)

    def step_batches(self, step: int, **layout: Any) -> list[Batch]:
        """The micro-batches of one data-parallel rank at `step`, counted from 0.

        `layout` are the fields of `StepLayout`. Step k takes rows [k * G, (k + 1) * G), G =
        `global_batch_size` packed rows; which of them are this rank's is decided by their cost (`balance.py`).
        `image_share` = (i, n) decodes the i-th of n shares of each
        micro-batch's images (`image_shares`); None decodes none.
        """
        maker = self._maker(StepLayout(**layout), self._inline(), Alone())
        reading: Future[Any] = Future()
        reading.set_result(maker.read(step, range(0)))
        return maker.make(step, reading)

    def iterate(
        self,
        start_step: int,
        end_step: int,
        *,
        prefetch_steps: int | None = None,
        exchange: Exchange | None = None,
        **layout: Any,
    ) -> Generator[list[Batch], None, None]:
        """Yield `step_batches` for steps [start_step, end_step), prepared `prefetch_steps` ahead in two threads.

        Two if not given, or one where they are prepared on a GPU, whose memory they take.
        An error in a thread is raised at the step that it belongs to. Closing the generator, or leaving the
        loop over it, ends the threads and the worker processes. With an `exchange` (`exchange.connect`) one rank
        of a model replica reads for all of it, a sample that fails on one rank is blank on all, and what stops one
        rank stops all at the same step.
        """
        plan = StepLayout(**layout)
        plan.check()  # before any process starts
        exchange, runner = exchange or Alone(), self._inline()
        has_images = self._make_pixels is not None and plan.image_share is not None
        if self._num_workers and (exchange.reads or has_images):
            runner = WorkerPool(self._task, self._num_workers, self._worker_timeout)
        maker = self._maker(plan, runner, exchange)
        if prefetch_steps is None:
            prefetch_steps = 2 if self._copies is None else 1
        ahead = Ahead(maker, end_step, prefetch_steps, self._copies)
        try:
            for step in range(start_step, end_step):
                started = time.perf_counter()
                batches = ahead.get(step)
                self._waits.append(time.perf_counter() - started)
                yield batches
        finally:
            ahead.close()

    def _plan(self, layout: StepLayout) -> StepPlan:
        pixels = self._make_pixels is not None
        return StepPlan(self.samples, self._order, layout, seq_length=self._seq_length, pixels=pixels)

    def _inline(self) -> Runner:
        make_pixels, make_targets = self._make_pixels, self._make_targets
        if not self._task.decode:
            make_pixels = make_targets = None
        return Inline(Readers(dialogues=self.samples, make_pixels=make_pixels, make_targets=make_targets))

    def _maker(self, layout: StepLayout, runner: Runner, exchange: Exchange) -> StepMaker:
        plan = self._plan(layout)
        makers = (self._make_pixels, self._make_targets)
        return StepMaker(plan, runner, exchange, *makers, self.samples, self._quarantine)

    def take_wait_ms(self) -> float:
        """Mean milliseconds that a step's batches were waited for since this was asked last.

        0 without a step.
        """
        waits, self._waits = self._waits, []
        return 1000.0 * sum(waits) / max(len(waits), 1)

    def fingerprint(self) -> str:
        """Hex digest of what decides the batches: records, seed, lengths, tokenizer, pixels.

        The image files' own bytes are not read for it.
        """
        digest = hashlib.blake2b(self._fingerprint.encode(), digest_size=16)
        for source in self._sources:
            digest.update(source.fingerprint().encode())
        digest.update(repr(self._image_processor and self._image_processor.fingerprint()).encode())
        if self._targets is not None:
            digest.update(self._targets.fingerprint().encode())
        return digest.hexdigest()
