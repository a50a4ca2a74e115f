"""What the data threads of a run's ranks tell each other: one reads for a model replica, all know what failed where.

Everything runs in background threads on gloo groups of its own, never on a group that the training step uses, and
waits by asking now and then, so that a thread can leave when its run ends while others are still waiting.
"""

import pickle
import threading
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from laver_mcore.data.errors import DataError

T = TypeVar("T")

_PATIENCE = timedelta(
    days=1
)  # a rank that is gone is noticed at once; one that saves a checkpoint is waited for
_POLL_SECONDS = 0.001


class Closed(Exception):
    """The exchange was closed while somebody waited."""


class Exchange(Protocol):
    """Between ranks; every rank makes the same calls in the same order, `share` from one thread, `gather` from one.

    `reads`: whether this rank is the one whose `make` is called.
    """

    reads: bool

    def from_first_rank(self, make: Callable[[], T]) -> T:
        """What `make` returns on the first rank of this model replica; the others do not call it.

        Its exception is raised on all of them.
        """

    def gather(self, value: T | None) -> Sequence[T]:
        """What the ranks of the whole run have, in their order, those with None left out."""

    def close(self) -> None:
        """Let go of whoever waits."""

    def reopened(self) -> "Exchange":
        """One between the same ranks, to be closed by itself; what this one was asked has to be done."""


class Alone:
    """A run of one rank."""

    reads = True

    def from_first_rank(self, make: Callable[[], T]) -> T:
        return make()

    def gather(self, value: T | None) -> Sequence[T]:
        return [] if value is None else [value]

    def close(self) -> None:
        pass

    def reopened(self) -> "Alone":
        return self


def connect(replica: dist.ProcessGroup) -> Exchange:
    """The exchange of this run, whose model replicas are such groups of ranks; all ranks call it together."""
    if dist.get_world_size() == 1:
        return Alone()
    world = dist.new_group(backend="gloo", timeout=_PATIENCE)
    own = tuple(dist.get_process_group_ranks(replica))
    everyones: list[tuple[int, ...]] = [()] * world.size()
    dist.all_gather_object(everyones, own, group=world)
    group = None
    for ranks in sorted(set(everyones)):  # every rank has to be there when a group is made
        made = dist.new_group(list(ranks), backend="gloo", timeout=_PATIENCE)
        group = made if ranks == own else group
    assert group is not None
    return _Gloo(world, group)


class _Gloo:
    def __init__(self, world: dist.ProcessGroup, replica: dist.ProcessGroup) -> None:
        self._world, self._replica = world, replica
        self.reads = replica.rank() == 0
        self._closing = threading.Event()

    def from_first_rank(self, make: Callable[[], T]) -> T:
        if self._replica.size() == 1:
            return make()
        made: tuple[Any, Exception | None] | None = None
        payload = torch.empty(0, dtype=torch.uint8)
        if self.reads:
            made = _outcome(make)
            payload = _pack(made)
        size = torch.tensor([len(payload)])
        self._wait(dist.broadcast(size, group=self._replica, group_src=0, async_op=True))
        if made is None:
            payload = torch.empty(int(size), dtype=torch.uint8)
        self._wait(dist.broadcast(payload, group=self._replica, group_src=0, async_op=True))
        value, error = _unpack(payload) if made is None else made
        if error is not None:
            raise error
        return value

    def gather(self, value: T | None) -> Sequence[T]:
        payload = torch.empty(0, dtype=torch.uint8) if value is None else _pack(value)
        longest = torch.tensor([len(payload)])
        self._wait(dist.all_reduce(longest, dist.ReduceOp.MAX, group=self._world, async_op=True))
        if not int(longest):  # as good as always: 8 bytes a step
            return []
        mine = torch.zeros(8 + int(longest), dtype=torch.uint8)
        mine[:8] = torch.from_numpy(np.array([len(payload)], dtype="<i8").view(np.uint8))
        mine[8 : 8 + len(payload)] = payload
        all_of_them = [torch.empty_like(mine) for _ in range(self._world.size())]
        self._wait(dist.all_gather(all_of_them, mine, group=self._world, async_op=True))
        sizes = [int(part[:8].numpy().view("<i8")[0]) for part in all_of_them]
        return [_unpack(part[8 : 8 + n]) for part, n in zip(all_of_them, sizes, strict=True) if n]

    def close(self) -> None:
        self._closing.set()

    def reopened(self) -> "_Gloo":
        return _Gloo(self._world, self._replica)

    def _wait(self, work: Any) -> None:
        while not work.is_completed():
            if self._closing.wait(_POLL_SECONDS):
                raise Closed
        try:
            work.wait()
        except RuntimeError as error:
            reason = str(error).split("\n")[0]
            raise DataError(f"another rank left the run ({reason}); its own error is above") from None


def _outcome(make: Callable[[], Any]) -> tuple[Any, Exception | None]:
    try:
        return make(), None
    except Exception as error:
        return None, error if isinstance(error, DataError) else RuntimeError(repr(error))


def _pack(value: Any) -> Tensor:
    return torch.from_numpy(np.frombuffer(pickle.dumps(value, protocol=5), dtype=np.uint8).copy())


def _unpack(payload: Tensor) -> Any:
    return pickle.loads(payload.numpy().tobytes())
