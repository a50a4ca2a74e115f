"""Who is named as silent: a rank whose thread has stopped, neither one that beats nor one that has left."""

import time

import pytest
import torch.distributed as dist

from laver_mcore.train.watchdog import Watchdog

SECONDS = 0.8


@pytest.mark.parametrize(("end", "named"), [("frozen", [[1]]), ("left", []), ("alive", [])])
def test_who_is_named(end, named):
    store, found = dist.HashStore(), []
    other = Watchdog(store, 1, 3, SECONDS, silent=lambda *_: None).__enter__()
    with (
        Watchdog(store, 0, 3, SECONDS, silent=lambda ranks, _: found.append(ranks)),
        Watchdog(store, 2, 3, SECONDS, silent=lambda *_: None),
    ):
        time.sleep(SECONDS / 2)
        if end == "frozen":
            other._stop.set()  # as SIGSTOP would: no word of leaving
        elif end == "left":
            other.__exit__()
        time.sleep(3 * SECONDS)
    assert found == named
    other._stop.set()
