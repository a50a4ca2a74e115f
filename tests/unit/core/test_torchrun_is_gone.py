"""A rank whose launcher dies while it starts is gone as well, before or after it could ask to be told."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

RANK = (
    "import os, sys; from laver_mcore.processes import end_with_torchrun; {first}end_with_torchrun(); {then}"
)
"""What stands for a rank: says its number once it is up."""
SAYS_SO = "print(os.getpid(), flush=True); import time; time.sleep(600)"


def is_gone(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z"


def wait_until_gone(pid: int) -> None:
    deadline = time.monotonic() + 30
    while not is_gone(pid):
        assert time.monotonic() < deadline, "the rank lives on"
        time.sleep(0.05)


@pytest.mark.parametrize("asked", ["before", "after"])
def test_a_rank_does_not_outlive_its_launcher(asked):
    """The launcher is killed once the rank has asked, or while the rank still waits to ask."""
    say = "print(os.getpid(), flush=True); "
    first = "" if asked == "before" else f"{say}sys.stdin.readline(); "
    rank = RANK.format(first=first, then=SAYS_SO if asked == "before" else "import time; time.sleep(600)")
    launcher = (
        "import subprocess, sys, time\n"
        f"subprocess.Popen([sys.executable, '-c', {rank!r}], start_new_session=True)\n"
        "time.sleep(600)"
    )
    environment = os.environ | {"TORCHELASTIC_RUN_ID": "x"}
    started = subprocess.Popen(
        [sys.executable, "-c", launcher],
        env=environment,
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert started.stdout is not None and started.stdin is not None
    pid = int(started.stdout.readline())
    assert not is_gone(pid)
    os.kill(started.pid, signal.SIGKILL)
    started.wait()
    if asked == "after":
        started.stdin.write("\n")
        started.stdin.flush()
    wait_until_gone(pid)


@pytest.mark.parametrize("variables", [{}, {"TORCHELASTIC_RUN_ID": "x"}], ids=["by itself", "under torchrun"])
def test_a_rank_with_a_launcher_lives(variables):
    environment = {
        name: value for name, value in os.environ.items() if name != "TORCHELASTIC_RUN_ID"
    } | variables
    code = RANK.format(first="", then="print('alive')")
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.stdout == "alive\n"


def test_without_torchrun_a_process_may_outlive_its_parent():
    """A shell that ends, as with `nohup laver train &`."""
    code = RANK.format(first="", then=SAYS_SO).replace("time.sleep(600)", "time.sleep(20)")
    environment = {name: value for name, value in os.environ.items() if name != "TORCHELASTIC_RUN_ID"}
    shell = ["sh", "-c", f'"{sys.executable}" -c "{code}" & sleep 0.1']
    found = subprocess.Popen(shell, env=environment, stdout=subprocess.PIPE, text=True)
    assert found.stdout is not None
    pid = int(found.stdout.readline())
    found.wait(timeout=30)
    time.sleep(0.5)
    assert not is_gone(pid)
    os.kill(pid, signal.SIGKILL)
