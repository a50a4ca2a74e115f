"""Where a step's time goes, measured without making the host wait for the device.

On a GPU a part is bracketed by two events on the current stream, read when a metrics line is written; elsewhere by the
clock. Every part is also a named range of the profiler. Parts may lie within one another: each is given its own time
alone, without that of the parts inside.
"""

import contextlib
import time
from collections import deque
from collections.abc import Iterator
from typing import Any

import torch
from torch.profiler import record_function

PARTS = ("vision", "teacher", "student", "optimizer", "ema")
"""Parts of a step; what is left of its wall time, without the wait for data, is `other`."""

_PENDING = 256
"""Parts on a GPU whose times may wait to be read before those that are finished are taken in."""


class Timers:
    """Milliseconds by part since they were last taken. Disabled, parts are ranges of the profiler and no more."""

    def __init__(self, device: torch.device | str = "cpu", *, enabled: bool = True) -> None:
        self._on_gpu = torch.device(device).type == "cuda"
        self._enabled = enabled
        self._ms: dict[str, float] = {}
        self._pending: deque[tuple[str, Any, Any, str | None]] = deque()
        self._stack: list[str] = []

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Measure what runs inside as part `name`."""
        with record_function(name):
            if not self._enabled:
                yield
                return
            parent = self._stack[-1] if self._stack else None
            self._stack.append(name)
            start = self._now()
            try:
                yield
            finally:
                self._stack.pop()
                self._pending.append((name, start, self._now(), parent))
                self._collect(wait=False)

    def take(self) -> dict[str, float]:
        """Milliseconds of each part since the last call; waits for the device."""
        self._collect(wait=True)
        taken, self._ms = self._ms, {}
        return taken

    def _now(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _collect(self, *, wait: bool) -> None:
        if not wait and self._on_gpu and len(self._pending) < _PENDING:
            return
        while self._pending:
            name, start, stop, parent = self._pending[0]
            if self._on_gpu:
                if wait:
                    stop.synchronize()
                elif not stop.query():
                    return
                elapsed = start.elapsed_time(stop)
            else:
                elapsed = 1000.0 * (stop - start)
            self._pending.popleft()
            self._ms[name] = self._ms.get(name, 0.0) + elapsed
            if parent is not None:
                self._ms[parent] = self._ms.get(parent, 0.0) - elapsed


def time_columns(
    taken: dict[str, float], data_wait_ms: float, seconds: float, steps: int
) -> dict[str, float]:
    """Entries of the metrics line, `time_*_ms` of one step: what `take` gave after `steps` steps of `seconds` each."""
    columns = {f"time_{name}_ms": taken.get(name, 0.0) / steps for name in PARTS}
    spent = sum(columns.values()) + data_wait_ms
    return {"time_data_ms": data_wait_ms, **columns, "time_other_ms": max(0.0, 1000.0 * seconds - spent)}
