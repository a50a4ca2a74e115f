"""Where ranks meet: a part of torchrun's store that no earlier attempt of theirs has written to.

torchrun keeps one store over all its restarts (pytorch/pytorch#135712), and what the ranks before wrote there sends the
next ones to addresses where nobody listens any more. Its count of restarts cannot tell attempts apart, for every node
counts its own; so rank 0 draws a name, and gives it to those who are alive.
"""

import time
import uuid
from datetime import timedelta

import torch.distributed as dist


def fresh_part(store: dist.Store, rank: int, world_size: int, timeout: timedelta) -> dist.Store:
    """A part of `store` for the ranks that call this together, whoever has called it before.

    `dist.DistStoreError` after `timeout` without one of them.
    """
    if rank == 0:
        name = uuid.uuid4().hex
        _tell(store, name, set(range(1, world_size)), timeout)
    else:
        mine = uuid.uuid4().hex
        store.set(f"here/{rank}", mine)
        name = store.get(f"name for/{mine}").decode()
        store.set(f"{name}/{rank}", "knows it")
    return dist.PrefixStore(name, store)


def _tell(store: dist.Store, name: str, missing: set[int], timeout: timedelta) -> None:
    """Give `name` to all that are `missing`; who says that it is here may be gone, its successor yet to come."""
    deadline = time.monotonic() + timeout.total_seconds()
    while missing:
        for rank in sorted(missing):
            if store.check([f"{name}/{rank}"]):
                missing.remove(rank)
            elif store.check([f"here/{rank}"]):
                store.set(f"name for/{store.get(f'here/{rank}').decode()}", name)
        if missing and time.monotonic() > deadline:
            raise dist.DistStoreError(f"rank {min(missing)} did not come within {timeout}")
        time.sleep(0.01)
