"""A rank that has fallen silent without dying, stopped or frozen, is named by the others, who end the job.

Every rank's thread counts up a number in the store by which the ranks met, which no collective holds up. Where another
rank's number stands still, all stacks are dumped and the process leaves with a status that torchrun takes for a
failure. What waits for a living rank, such as a collective that one never joins, is left to the collectives' own
timeout.
"""

import contextlib
import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

EXIT_STATUS = 75
"""EX_TEMPFAIL of sysexits.h: it may go better when tried again."""
_BEATS = 8
"""How often a rank is heard within the timeout."""
_LEFT = b"left"


def end_the_job(ranks: list[int], seconds: float) -> None:
    """Say who is silent, dump the stacks of all threads, leave."""
    names = ", ".join(map(str, ranks))
    print(
        f"error: nothing was heard of rank {names} for {seconds:.0f} s; the job ends",
        file=sys.stderr,
        flush=True,
    )
    faulthandler.dump_traceback(all_threads=True)
    time.sleep(2 * seconds / _BEATS)  # the others see it in the meantime, before they lose this rank
    os._exit(EXIT_STATUS)


def own_store() -> dist.Store:
    """A connection of one's own to the store of the process group: one that is shared waits for its other users."""
    own: dist.Store = _get_default_store().clone()  # type: ignore[attr-defined]
    return own


class Watchdog:
    """Context in which this rank beats and listens to the others; `silent` gets who is silent, after `seconds`."""

    def __init__(
        self,
        store: dist.Store,
        rank: int,
        world_size: int,
        seconds: float,
        silent: Callable[[list[int], float], None] = end_the_job,
    ) -> None:
        self._store, self._own, self._seconds, self._silent = store, f"beat/{rank}", seconds, silent
        self._others = {r: f"beat/{r}" for r in range(world_size) if r != rank}
        self._heard: dict[int, tuple[bytes, float]] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        with contextlib.suppress(RuntimeError):  # the launcher, which holds the store, may be gone
            self._store.set(self._own, _LEFT.decode())

    def _run(self) -> None:
        count = 0
        while not self._stop.wait(self._seconds / _BEATS):
            count += 1
            try:
                self._store.set(self._own, str(count))
                found = self._standing_still()
            except RuntimeError:
                return
            if found:
                self._silent(found, self._seconds)
                return

    def _standing_still(self) -> list[int]:
        now, found = time.monotonic(), []
        for rank, key in self._others.items():
            if not self._store.check([key]):
                continue  # not there yet
            beat = self._store.get(key)
            last, since = self._heard.get(rank, (b"", now))
            if beat != last:
                self._heard[rank] = beat, now
            elif beat != _LEFT and now - since > self._seconds:
                found.append(rank)
        return found
