"""A run that is told to stop saves first: SIGTERM is remembered, and all ranks agree at the end of a step."""

import signal
from datetime import timedelta
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist


class ExitSignal:
    """Context in which `signum` no longer ends the process; `received` asks all ranks whether any of them got it.

    Ranks are told at different moments, and one that stopped by itself would leave the others waiting in a collective:
    they ask each other once a step, on a gloo group, so that nobody waits for the GPU. One that was told stays deaf to
    further signals, to end in peace.
    """

    def __init__(self, signum: int = signal.SIGTERM) -> None:
        self._signum, self.seen = signum, False
        self._group = dist.new_group(backend="gloo", timeout=timedelta(days=1))
        self._previous: Any = None

    def __enter__(self) -> "ExitSignal":
        self._previous = signal.signal(self._signum, self._remember)
        return self

    def __exit__(self, *_: object) -> None:
        # A run that is told to stop is told again: by the scheduler, and by torchrun, which passes it on later.
        if not self.seen:
            signal.signal(self._signum, self._previous)

    def _remember(self, _signum: int, _frame: FrameType | None) -> None:
        self.seen = True

    def received(self) -> bool:
        """Whether any rank has been told to stop; the same answer on all of them."""
        flag = torch.tensor([int(self.seen)], dtype=torch.int32, device="cpu")
        dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self._group)
        self.seen = bool(flag.item())
        return self.seen
