"""Work done beside training by a copy of the process, which sees memory as it stood when it began, and ends with it."""

import contextlib
import gc
import logging
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any, NoReturn

import torch

from laver_mcore.megatron.checkpoints import reason_of
from laver_mcore.processes import end_with_parent

_NOT_ITS_BUSINESS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
"""Schedulers and terminals send these to every process of a run; it is the run that answers them."""


class Copied:
    """A copy of this process, at work; one thread, none of the others' locks, and no GPU."""

    def __init__(self, work: Callable[[], Any]) -> None:
        self._receiver, sender = multiprocessing.Pipe(duplex=False)
        sys.stdout.flush()  # or the copy says it once more
        sys.stderr.flush()
        self._pid = os.fork()
        if self._pid == 0:
            self._receiver.close()
            _work(work, sender)
        sender.close()

    def is_done(self) -> bool:
        """Whether `result` would not wait."""
        return self._receiver.poll()

    def result(self) -> Any:
        """What the work returned; `RuntimeError` with one line where it failed. Waits for it; asked for once."""
        try:
            failed, found = self._receiver.recv()
        except EOFError:
            failed, found = True, "the process that wrote it has died"
        self._receiver.close()
        os.waitpid(self._pid, 0)
        if failed:
            raise RuntimeError(found)
        return found


def _work(work: Callable[[], Any], sender: Connection) -> NoReturn:
    """What the copy does; nothing of the run that it is a copy of may happen again here, its exit included."""
    try:
        end_with_parent()
        os.register_at_fork(after_in_child=end_with_parent)  # what Megatron-Core starts for each file
        for number in _NOT_ITS_BUSINESS:
            signal.signal(number, signal.SIG_IGN)
        logging.disable()  # what goes wrong is said once, by the run
        gc.disable()  # the run's tensors are not the copy's to free
        torch.set_num_threads(1)  # the run's other threads are not in the copy, and nobody would wake them
        try:
            found = (False, work())
        except Exception as error:
            found = (True, reason_of(error))
        with contextlib.suppress(OSError):
            sender.send(found)
    finally:
        os._exit(0)
