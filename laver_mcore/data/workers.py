"""Worker processes that read, tokenise and (on Pillow) decode: spawned, replaced when they die.

    parent: WorkerPool.submit(plan) -> Future        one thread a worker waits for its answer, or for its
    death child:  _serve: plan -> assemble -> pixels or bytes -> pipe

A worker that is killed is started again and given the same plan, for a plan's answer is a pure function; one
that fails again and again, or does not answer, stops the run with an error. A worker whose parent is gone
ends at the next thing that it reads or writes.
"""

import logging
import multiprocessing
import os
import pickle
import queue
import signal
import threading
from concurrent.futures import Future
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

from laver_mcore.data.assemble import Assembled, Plan, assemble, with_bytes, with_pixels
from laver_mcore.data.dialogues import Dialogues
from laver_mcore.data.errors import DataError
from laver_mcore.data.image_backend import make_backend
from laver_mcore.data.images import ImageProcessor

logger = logging.getLogger(__name__)

MAX_DEATHS = 3  # of one worker, in a row
ANSWER_SECONDS = 600.0  # a plan's answer takes well under a minute, a cold network disk included
CLOSE_SECONDS = 5.0


@dataclass(frozen=True, kw_only=True)
class WorkerTask:
    """What every worker is given once.

    `decode` says whether it turns images into pixels, or only reads them.
    """

    dialogues: Dialogues
    image_processor: ImageProcessor | None
    decode: bool
    image_cache_mib: int = 0


def _serve(connection: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides when to stop
    torch.set_num_threads(1)
    try:
        task: WorkerTask = pickle.loads(connection.recv_bytes())
        maker = None
        if task.decode and task.image_processor is not None:
            maker = make_backend("pillow", task.image_processor, image_cache_mib=task.image_cache_mib)
        while True:
            plan: Plan = pickle.loads(connection.recv_bytes())
            answer: Assembled | Exception
            try:
                answer = assemble(task.dialogues, plan)
                if plan.image_share is not None and task.image_processor is not None:
                    answer = with_bytes(answer) if maker is None else with_pixels(answer, maker)
            except Exception as error:
                answer = error if isinstance(error, DataError) else RuntimeError(repr(error))
            connection.send_bytes(pickle.dumps(answer, protocol=5))
    except (EOFError, OSError):
        return  # the parent has closed the pipe, or is gone


class _Dead(Exception):
    """The worker ended, or did not answer, before its answer."""


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
        self._exchange_started = False
        self._payload = payload

    def ask(self, plan: Plan) -> Any:
        """The answer to one plan; raises _Dead."""
        try:
            if not self._exchange_started:
                self._pipe.send_bytes(self._payload)
                self._exchange_started = True
            self._pipe.send_bytes(pickle.dumps(plan))
            ready = wait([self._pipe, self.process.sentinel], timeout=ANSWER_SECONDS)
            if self._pipe in ready or self._pipe.poll():
                return pickle.loads(self._pipe.recv_bytes())
        except (EOFError, OSError, pickle.UnpicklingError):
            ready = [self.process.sentinel]
        if not ready:
            raise _Dead(f"did not answer within {ANSWER_SECONDS:.0f} s")
        self.process.join(CLOSE_SECONDS)
        raise _Dead(f"ended with exit code {self.process.exitcode}")

    def close(self) -> None:
        """End the process: politely, then not."""
        self._pipe.close()
        self.process.join(CLOSE_SECONDS if self._exchange_started else 0.0)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()


class WorkerPool:
    """`num_workers` processes; close it, or leave a `with` block, and none is left."""

    def __init__(self, task: WorkerTask, num_workers: int) -> None:
        payload = pickle.dumps(task)
        self._plans: queue.SimpleQueue[tuple[Plan, Future[Assembled]] | None] = queue.SimpleQueue()
        self._closing = threading.Event()
        self._workers = [_Worker(payload) for _ in range(num_workers)]
        self._payload = payload
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

    def submit(self, plan: Plan) -> "Future[Assembled]":
        """Have a plan assembled by whichever worker is free first."""
        future: Future[Assembled] = Future()
        self._plans.put((plan, future))
        return future

    def close(self) -> None:
        """End all workers, whatever they are doing; plans without an answer are cancelled."""
        self._closing.set()
        for _ in self._threads:
            self._plans.put(None)
        for worker in self._workers:
            if worker.process.is_alive() and worker.process.pid is not None:
                os.kill(worker.process.pid, signal.SIGTERM)
        for thread in self._threads:
            thread.join()
        for worker in self._workers:
            worker.close()

    def __enter__(self) -> "WorkerPool":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _run(self, number: int) -> None:
        while (item := self._plans.get()) is not None:
            plan, future = item
            if self._closing.is_set() or not future.set_running_or_notify_cancel():
                future.cancel()
                continue
            try:
                answer = self._answer(number, plan)
            except Exception as error:
                answer = error
            if isinstance(answer, Exception):
                future.set_exception(answer)
            else:
                future.set_result(answer)

    def _answer(self, number: int, plan: Plan) -> Any:
        for death in range(1, MAX_DEATHS + 1):
            try:
                return self._workers[number].ask(plan)
            except _Dead as error:
                if self._closing.is_set():
                    raise DataError("the data workers were closed") from None
                logger.warning("data worker %d %s; starting it again (%d)", number, error, death)
                self._workers[number].process.kill()
                self._workers[number].close()
                self._workers[number] = _Worker(self._payload)
                reason = str(error)
        raise DataError(
            f"data worker {number} {reason}, {MAX_DEATHS} times in a row; look for the kernel's "
            "out-of-memory killer, or lower num_workers"
        )
