"""Ranks that meet in a store find each other, whatever earlier attempts of theirs have left in it."""

import threading
import time
from datetime import timedelta

import pytest
import torch.distributed as dist

from laver_mcore.megatron.rendezvous import fresh_part

SOON = timedelta(seconds=0.3)
PATIENT = timedelta(seconds=5)


def meet(store, delays, timeout=PATIENT):
    """What each rank writes for the others under one key, and reads of them; a rank comes after its delay (s)."""
    found = {}

    def rank_comes(rank):
        time.sleep(delays[rank])
        part = fresh_part(store, rank, len(delays), timeout)
        part.set(f"address/{rank}", f"{rank} of {id(delays)}")
        found[rank] = [part.get(f"address/{other}").decode() for other in range(len(delays))]

    threads = [threading.Thread(target=rank_comes, args=(rank,)) for rank in range(len(delays))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


# What earlier attempts did with the store.
BEFORE = {
    "nothing": lambda store: None,
    "ended": lambda store: meet(store, [0.0, 0.0, 0.0]),
    "ended twice": lambda store: (meet(store, [0.0, 0.0, 0.0]), meet(store, [0.0, 0.0, 0.0])),
    "died before they had met": lambda store: (store.set("here/1", "gone"), store.set("here/2", "gone too")),
}


@pytest.mark.parametrize("before", BEFORE.values(), ids=BEFORE)
@pytest.mark.parametrize("delays", [[0.0, 0.2, 0.4], [0.3, 0.0, 0.1]], ids=["0 first", "0 last"])
def test_all_read_what_this_attempt_wrote(before, delays):
    store = dist.HashStore()
    store.set_timeout(PATIENT)
    before(store)
    wanted = [f"{rank} of {id(delays)}" for rank in range(3)]
    assert meet(store, delays) == dict.fromkeys(range(3), wanted)


def test_a_rank_that_does_not_come_is_named():
    store = dist.HashStore()
    store.set("here/1", "gone")
    with pytest.raises(dist.DistStoreError, match="rank 1 did not come"):
        fresh_part(store, 0, 2, SOON)
