"""Steps prepared ahead of the one that is trained on: two threads, and behind them the worker processes.

reading  the model replica's first rank reads and tokenises, its other ranks get what it read
making   each rank's share of the images -> pixels -> Batch; all ranks of the run agree on what failed
"""

import logging
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from laver_mcore.data.errors import DataError
from laver_mcore.data.images.wanted import PixelMaker
from laver_mcore.data.order.dialogues import Dialogues
from laver_mcore.data.sequence.batch import Batch
from laver_mcore.data.serve.assemble import ImageTask, ReadImages, ReadTask, TokenizedSamples, decode_here
from laver_mcore.data.serve.device_copies import DeviceCopies, Sent
from laver_mcore.data.serve.exchange import Exchange
from laver_mcore.data.serve.quarantine import Quarantine
from laver_mcore.data.serve.steps import StepPlan
from laver_mcore.data.serve.workers import Runner

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class _Failures:
    """What went wrong on one rank in one step: samples and why, and an error that stops the run."""

    failures: dict[int, str]
    error: str | None = None


@dataclass(frozen=True, kw_only=True)
class _MicroBatch:
    """A micro-batch on its way: this rank's images are being worked on."""

    read: ReadTask
    texts: TokenizedSamples
    task: ImageTask
    pictures: "Future[ReadImages] | None"


class StepMaker:
    """Makes the micro-batches of a step; what comes out depends on the step and the layout alone."""

    def __init__(
        self,
        plan: StepPlan,
        runner: Runner,
        exchange: Exchange,
        make_pixels: PixelMaker | None,
        make_targets: PixelMaker | None,
        dialogues: Dialogues,
        quarantine: Quarantine,
    ) -> None:
        self.plan, self.runner, self.exchange = plan, runner, exchange
        self._make_pixels, self._make_targets = make_pixels, make_targets
        self._dialogues, self._quarantine = dialogues, quarantine
        self._reading: dict[int, list[Future[TokenizedSamples]]] = {}

    def read(self, step: int, ahead: range) -> list[_MicroBatch]:
        """The step's samples, with the work on its images begun; reading of the steps in `ahead` begins as well."""

        def read_here() -> list[TokenizedSamples]:
            for number in (step, *ahead) if self.runner.concurrent else (step,):
                if number not in self._reading:
                    self._reading[number] = [self.runner.submit(task) for task in self.plan.reads(number)]
            return [future.result() for future in self._reading.pop(step)]

        texts = self.exchange.from_first_rank(read_here)
        return [self._begin(*part) for part in zip(self.plan.reads(step), texts, strict=True)]

    def make(self, step: int, reading: "Future[list[_MicroBatch]]") -> list[Batch]:
        """The batches of a step. A sample that fails on any rank is blank on all that hold it.

        DataError on every rank alike when one of them has an error, or too many samples are bad.
        """
        shares, found, batches = self._finish(reading)
        self._quarantine.saw(self.plan.num_samples(step))
        while everyones := self.exchange.gather(found):
            self._judge(everyones, found)
            failed = frozenset(number for each in everyones for number in each.failures)
            shares = [
                self._begin(share.read, self.plan.silence(share.read, share.texts, failed))
                if failed.intersection(share.read.members)
                else share
                for share in shares
            ]
            ready: Future[list[_MicroBatch]] = Future()
            ready.set_result(shares)
            shares, found, batches = self._finish(ready)
        return batches

    def _begin(self, read: ReadTask, texts: TokenizedSamples) -> _MicroBatch:
        task = self.plan.images(read, texts)
        pictures = self.runner.submit(task) if self.plan.decodes else None
        return _MicroBatch(read=read, texts=texts, task=task, pictures=pictures)

    def _finish(
        self, reading: "Future[list[_MicroBatch]]"
    ) -> tuple[list[_MicroBatch], _Failures | None, list[Batch]]:
        """Pixels and batches, or what went wrong: an error is for all ranks to know before it is raised."""
        shares: list[_MicroBatch] = []
        failures: dict[int, str] = {}
        try:
            shares = reading.result()
            finished = [self._pixels(share) for share in shares]
            for share, pictures in zip(shares, finished, strict=True):
                failures |= share.texts.failures | (pictures.failures if pictures is not None else {})
            if failures:
                return shares, _Failures(failures=failures), []
            parts = zip(shares, finished, strict=True)
            return shares, None, [self.plan.collate(share.texts, pictures) for share, pictures in parts]
        except DataError as error:
            return shares, _Failures(failures={}, error=str(error)), []
        except Exception as error:
            logger.debug("step data", exc_info=True)
            return shares, _Failures(failures={}, error=repr(error)), []

    def _pixels(self, share: _MicroBatch) -> ReadImages | None:
        if share.pictures is None:
            return None
        assert self._make_pixels is not None
        pictures, owners = share.pictures.result(), share.task.owners
        return decode_here(pictures, owners, self._make_pixels, self._make_targets)

    def _judge(self, everyones: Sequence[_Failures], own: _Failures | None) -> None:
        """List what failed; DataError if that stops the run. Every rank hears the same, so all raise the same."""
        for each in everyones:
            if each.error is not None:
                raise DataError(each.error)
        listed: set[int] = set()
        for each in everyones:
            for number, why in each.failures.items():
                if number not in listed:
                    listed.add(number)
                    write = own is not None and own.failures.get(number) == why
                    self._quarantine.add_failure(self._dialogues.key(number), why, write=write)
        self._quarantine.check()


class Ahead:
    """Prepares steps up to `end_step`, `num_steps` ahead; with `copies`, on the GPU."""

    def __init__(
        self, maker: StepMaker, end_step: int, num_steps: int, copies: DeviceCopies | None = None
    ) -> None:
        self._maker, self._end, self._num_steps, self._copies = maker, end_step, num_steps, copies
        self._reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="laver-data-read")
        self._maker_thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="laver-data-make")
        self._pending: deque[Future[list[Batch] | Sent]] = deque()
        self._next: int | None = None

    def get(self, step: int) -> list[Batch]:
        """The batches of `step`; steps are asked for in order."""
        first = step if self._next is None else self._next
        for number in range(first, min(step + self._num_steps + 1, self._end)):
            ahead = range(number + 1, min(number + self._num_steps + 1, self._end))
            reading = self._reader.submit(self._maker.read, number, ahead)
            self._pending.append(self._maker_thread.submit(self._make, number, reading))
            self._next = number + 1
        batches = self._pending.popleft().result()
        if isinstance(batches, Sent):
            assert self._copies is not None
            return self._copies.receive(batches)
        return batches

    def _make(self, step: int, reading: "Future[list[_MicroBatch]]") -> list[Batch] | Sent:
        batches = self._maker.make(step, reading)
        return batches if self._copies is None else self._copies.send(batches)

    def close(self) -> None:
        """End threads and workers; no other rank is waited for."""
        threads = (self._reader, self._maker_thread)
        for thread in threads:
            thread.shutdown(wait=False, cancel_futures=True)
        self._maker.exchange.close()
        self._maker.runner.close()
        for thread in threads:
            thread.shutdown(wait=True)
