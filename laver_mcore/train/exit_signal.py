"""A run that is told to stop saves first: the signal is remembered, and all ranks agree at the end of a step."""

import signal
from collections.abc import Sequence
from datetime import timedelta
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT)
"""What schedulers, launchers, closed terminals and people send."""


class ExitSignal:
    """Context in which these signals no longer end the process; `received` asks all ranks whether any of them got one.

    Ranks are told at different moments, and one that stopped by itself would leave the others waiting in a collective:
    they ask each other once a step, on a gloo group, so that nobody waits for the GPU. One that was told stays deaf to
    further signals, to end in peace; only a second Ctrl-C ends it at once.
    """

    def __init__(self, signals: Sequence[signal.Signals] = SIGNALS) -> None:
        self._signals, self.seen = signals, False
        self._group = dist.new_group(backend="gloo", timeout=timedelta(days=1))
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "ExitSignal":
        self._previous = {number: signal.signal(number, self._remember) for number in self._signals}
        return self

    def __exit__(self, *_: object) -> None:
        # A run that is told to stop is told again: by the scheduler, and by torchrun, which passes it on later.
        if not self.seen:
            for number, handler in self._previous.items():
                signal.signal(number, handler)

    def _remember(self, signum: int, _frame: FrameType | None) -> None:
        if signum == signal.SIGINT:
            if self.seen:
                raise KeyboardInterrupt
            print("interrupted: the step is finished, then saved; once more ends the run at once", flush=True)
        self.seen = True

    def received(self) -> bool:
        """Whether any rank has been told to stop; the same answer on all of them."""
        flag = torch.tensor([int(self.seen)], dtype=torch.int32, device="cpu")
        dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self._group)
        self.seen = bool(flag.item())
        return self.seen
