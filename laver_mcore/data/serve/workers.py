"""Worker processes that read, tokenise and (on Pillow) decode: spawned, replaced when they die or hang.

    parent: WorkerPool.submit(task) -> Future    one thread a worker waits for its answer, its death, or its deadline
    child:  _serve: task -> "at sample 7", "at sample 9", ... , answer -> pipe

A worker that dies, or says nothing for `timeout` seconds, is killed and a new one is given the same task, for its
answer is a pure function. A sample at which that happens twice is lost: it is named in the answer's failures, and the
task is done without it. A worker that cannot even start stops the run with an error. A worker whose parent is gone
ends at the next thing that it reads or writes.
"""

import logging
import multiprocessing
import os
import pickle
import queue
import signal
import threading
from collections import Counter
from concurrent.futures import Future
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any, Protocol

import torch

from laver_mcore.data.errors import DataError
from laver_mcore.data.images.backends import make_backend
from laver_mcore.data.images.decode import DecodedImages
from laver_mcore.data.images.processors import ImageProcessor
from laver_mcore.data.images.target_pixels import TargetSource
from laver_mcore.data.order.dialogues import Dialogues
from laver_mcore.data.serve.assemble import Readers, Task

logger = logging.getLogger(__name__)

MAX_DEATHS = 3  # of one worker in a row, before it has touched a sample
TRIES = 2  # of a sample
START_SECONDS = 300.0  # imports from a cold network disk
CLOSE_SECONDS = 5.0


class Runner(Protocol):
    """Does tasks, here or elsewhere; `concurrent`: while the caller does something else."""

    concurrent: bool

    def submit(self, task: Task) -> "Future[Any]":
        """`TokenizedSamples` or `ReadImages`, in time."""

    def close(self) -> None:
        """End everything; what is not done is cancelled."""


class Inline:
    """Does a task at once, in the thread that submits it."""

    concurrent = False

    def __init__(self, readers: Readers) -> None:
        self._readers = readers

    def submit(self, task: Task) -> "Future[Any]":
        future: Future[Any] = Future()
        try:
            future.set_result(task.run(self._readers, lambda number: None))
        except Exception as error:
            future.set_exception(error)
        return future

    def close(self) -> None:
        pass


@dataclass(frozen=True, kw_only=True)
class WorkerSetup:
    """What every worker is given once.

    `decode` says whether it turns images into pixels, or only reads them.
    """

    dialogues: Dialogues
    image_processor: ImageProcessor | None
    targets: TargetSource | None = None
    decode: bool


def _serve(connection: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides when to stop
    torch.set_num_threads(1)
    try:
        given: WorkerSetup = pickle.loads(connection.recv_bytes())
        processor, targets = (given.image_processor, given.targets) if given.decode else (None, None)
        decoded = DecodedImages(max_bytes=0)
        readers = Readers(
            dialogues=given.dialogues,
            make_pixels=None if processor is None else make_backend("pillow", processor, decoded=decoded),
            make_targets=None if targets is None else targets.maker(decoded),
        )
        connection.send_bytes(pickle.dumps(None))  # ready
        while True:
            task: Task = pickle.loads(connection.recv_bytes())
            answer: Any
            try:
                answer = task.run(readers, lambda number: connection.send_bytes(pickle.dumps(int(number))))
            except Exception as error:
                answer = error if isinstance(error, DataError) else RuntimeError(repr(error))
            connection.send_bytes(pickle.dumps(answer, protocol=5))
    except (EOFError, OSError):
        return  # the parent has closed the pipe, or is gone


class _LostWorker(Exception):
    """The worker ended, or said nothing for too long; `sample` is where, None if it had not begun with one."""

    def __init__(self, reason: str, sample: int | None) -> None:
        super().__init__(reason)
        self.sample = sample


class _Worker:
    """One process and its pipe."""

    def __init__(self, payload: bytes) -> None:
        spawn = multiprocessing.get_context("spawn")
        self._pipe, theirs = spawn.Pipe()
        self.process: Any = spawn.Process(
            target=_serve, args=(theirs,), name="laver-data-worker", daemon=True
        )
        self.process.start()
        theirs.close()
        self._ready = False
        self._payload = payload

    def ask(self, task: Task, timeout: float) -> Any:
        """The answer to one task; raises _LostWorker."""
        sample: int | None = None
        try:
            if not self._ready:
                self._pipe.send_bytes(self._payload)
                self._next(max(START_SECONDS, timeout), None)
                self._ready = True
            self._pipe.send_bytes(pickle.dumps(task))
            while isinstance(answer := self._next(timeout, sample), int):
                sample = answer
            return answer
        except (EOFError, OSError, pickle.UnpicklingError):
            self.process.join(CLOSE_SECONDS)
            raise _LostWorker(f"ended with exit code {self.process.exitcode}", sample) from None

    def _next(self, timeout: float, sample: int | None) -> Any:
        ready = wait([self._pipe, self.process.sentinel], timeout=timeout)
        if not ready:
            raise _LostWorker(f"said nothing for {timeout:.0f} s", sample)
        return pickle.loads(self._pipe.recv_bytes())  # EOFError where it has died in silence

    def close(self, politely: bool = True) -> None:
        """End the process: politely, then not."""
        self._pipe.close()
        self.process.join(CLOSE_SECONDS if politely and self._ready else 0.0)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()


class WorkerPool:
    """`num_workers` processes; close it, or leave a `with` block, and none is left.

    `timeout` is how many seconds a worker may be silent over one sample.
    """

    concurrent = True

    def __init__(self, task: WorkerSetup, num_workers: int, timeout: float = 30.0) -> None:
        self._payload, self._timeout = pickle.dumps(task), timeout
        self._tasks: queue.SimpleQueue[tuple[Task, Future[Any]] | None] = queue.SimpleQueue()
        self._closing, self._lock = threading.Event(), threading.Lock()
        self._workers = [_Worker(self._payload) for _ in range(num_workers)]
        self._threads = [
            threading.Thread(
                target=self._run, args=(number,), name=f"laver-data-worker-{number}", daemon=True
            )
            for number in range(num_workers)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def process_ids(self) -> list[int]:
        """Of the workers as they are now."""
        return [worker.process.pid for worker in self._workers]

    def submit(self, task: Task) -> "Future[Any]":
        """Have a task done by whichever worker is free first."""
        future: Future[Any] = Future()
        with self._lock:
            if self._closing.is_set():
                future.cancel()
            else:
                self._tasks.put((task, future))
        return future

    def close(self) -> None:
        """End all workers, whatever they are doing; tasks without an answer are cancelled."""
        with self._lock:  # no task comes behind the end
            self._closing.set()
            for _ in self._threads:
                self._tasks.put(None)
        for worker in self._workers:
            if worker.process.is_alive() and worker.process.pid is not None:
                os.kill(worker.process.pid, signal.SIGKILL)  # a stopped one would not hear anything else
        for thread in self._threads:
            thread.join()
        for worker in self._workers:
            worker.close()

    def __enter__(self) -> "WorkerPool":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _run(self, number: int) -> None:
        while (item := self._tasks.get()) is not None:
            task, future = item
            if self._closing.is_set() or not future.set_running_or_notify_cancel():
                future.cancel()
                continue
            try:
                answer = self._answer(number, task)
            except Exception as error:
                answer = error
            if isinstance(answer, Exception):
                future.set_exception(answer)
            else:
                future.set_result(answer)

    def _answer(self, number: int, task: Task) -> Any:
        failed: Counter[int | None] = Counter()
        while True:
            try:
                return self._workers[number].ask(task, self._timeout)
            except _LostWorker as error:
                if self._closing.is_set():
                    raise DataError("the data workers were closed") from None
                reason, sample = str(error), error.sample
            failed[sample] += 1
            logger.warning("data worker %d %s; starting it again (%d)", number, reason, failed[sample])
            self._workers[number].close(politely=False)
            self._workers[number] = _Worker(self._payload)
            if sample is None and failed[sample] == MAX_DEATHS:
                raise DataError(
                    f"data worker {number} {reason}, {MAX_DEATHS} times in a row; look for the kernel's "
                    "out-of-memory killer, or lower num_workers"
                )
            if sample is not None and failed[sample] == TRIES:
                task = task.without(sample, f"a data worker {reason} over it, {TRIES} times")
