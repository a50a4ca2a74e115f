"""The exchange between data threads, over real process groups: one reads for a replica, all agree, nobody hangs."""

import time

import pytest
from sample_run import write_recipe, write_sample_data

from integration.harness import torchrun


@pytest.mark.parametrize("last", ["close", "leave"])
def test_ranks_tell_each_other_and_leave(last):
    started = time.monotonic()
    done = torchrun(4, "tests/integration/exchange_worker.py", last)
    assert all(f"rank {rank} is done" in done.stdout for rank in range(4)), done.stdout + done.stderr[-4000:]
    assert done.returncode == 0, done.stderr[-4000:]
    assert time.monotonic() - started < 200


@pytest.mark.parametrize("layout", [(), ("--tensor-model-parallel-size", "2")], ids=["data", "tensor"])
def test_a_crash_of_one_rank_ends_all(layout, tmp_path):
    """Its data threads wait for ranks that will not come; its exit must not."""
    write_sample_data(tmp_path)
    recipe = write_recipe(tmp_path)
    argv = ("--config", str(recipe), "--train-iters", "50", "--num-workers", "1", *layout)
    done = torchrun(2, "tests/integration/crash_worker.py", *argv, timeout=200)
    assert done.returncode != 0
    assert "a crash on one rank" in done.stderr
