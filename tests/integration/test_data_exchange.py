"""The exchange between data threads, over real process groups: one reads for a replica, all agree, nobody hangs."""

import time

import pytest

from integration.harness import torchrun


@pytest.mark.parametrize("last", ["close", "leave"])
def test_ranks_tell_each_other_and_leave(last):
    started = time.monotonic()
    done = torchrun(4, "tests/integration/exchange_worker.py", last)
    assert all(f"rank {rank} is done" in done.stdout for rank in range(4)), done.stdout + done.stderr[-4000:]
    assert done.returncode == 0, done.stderr[-4000:]
    assert time.monotonic() - started < 200
