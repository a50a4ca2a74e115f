"""Work beside the run: memory as it stood, one line where it fails, no process that outlives the run."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from laver_mcore.megatron.background import Copied


def test_it_sees_memory_as_it_stood():
    weights = torch.arange(100_000.0, dtype=torch.float64)
    gate, opens = os.pipe()
    copied = Copied(lambda: (os.read(gate, 1), weights.sum().item())[1])
    weights.zero_()
    assert not copied.is_done()
    os.write(opens, b"x")
    assert copied.result() == sum(range(100_000))
    assert weights.sum() == 0


def test_more_than_a_pipe_holds_comes_back():
    copied = Copied(lambda: "x" * 10**7)
    deadline = time.monotonic() + 20
    while not copied.is_done() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(copied.result()) == 10**7


def raises():
    raise OSError(28, "No space left on device")


FAILURES = {
    "raises": (raises, "No space left on device"),
    "killed": (lambda: os.kill(os.getpid(), signal.SIGKILL), "the process that wrote it has died"),
    "exits": (lambda: os._exit(3), "the process that wrote it has died"),
}


@pytest.mark.parametrize(("work", "words"), FAILURES.values(), ids=FAILURES)
def test_a_failure_is_one_line(work, words):
    with pytest.raises(RuntimeError, match=words) as raised:
        Copied(work).result()
    assert "\n" not in str(raised.value)


def test_what_tells_a_run_to_stop_does_not_stop_it():
    def told():
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
            os.kill(os.getpid(), number)
        return "written"

    assert Copied(told).result() == "written"


RUN = """
import os, sys, time
from laver_mcore.megatron.background import Copied
def work():
    if os.fork() == 0:                              # as Megatron-Core does for each file
        os.write(1, b'%d\\n' % os.getpid()); time.sleep(600)
    os.write(1, b'%d\\n' % os.getpid()); time.sleep(600)
Copied(work)
time.sleep(600)
"""


def lives(pid):
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


def test_it_ends_with_the_run_and_so_does_what_it_has_started():
    run = subprocess.Popen([sys.executable, "-W", "ignore", "-c", RUN], stdout=subprocess.PIPE, text=True)
    assert run.stdout is not None
    found = [int(run.stdout.readline()) for _ in range(2)]
    assert all(map(lives, found))
    run.kill()
    run.wait()
    deadline = time.monotonic() + 20
    while any(map(lives, found)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(lives, found))
