"""Runs that are told to stop, lose their launcher or are started twice, in real processes: nothing lost, none left."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from long import LONG

from integration.harness import REPOSITORY, environment, read_metrics

ENDLESS = "--train-iters 100000 --no-tensorboard"


def start(data, run, *launcher, flags=""):
    """A run that would never end, its output in DIR.log, once it has taken a few steps."""
    command = [
        sys.executable,
        *launcher,
        "pretrain_laver.py",
        "--config",
        str(data / "recipe.yaml"),
        "--save",
        str(run),
    ]
    log = run.with_suffix(".log")
    with log.open("w") as file:
        process = subprocess.Popen(
            [*command, *ENDLESS.split(), *flags.split()],
            cwd=REPOSITORY,
            env=environment(),
            stdout=file,
            stderr=file,
        )
    deadline, metrics = time.monotonic() + 200, run / "metrics.jsonl"
    while not (metrics.is_file() and len(metrics.read_text().splitlines()) > 2):
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-4000:]
        time.sleep(0.1)
    return process


TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


def family(run):
    """Processes of a run, whoever their parents are now: all have its folder in what they were started with."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                words = (entry / "environ").read_bytes() + (entry / "cmdline").read_bytes()
                state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
            except OSError:
                continue
            if str(run).encode() in words and state != "Z":
                found.append(int(entry.name))
    return found


def gone(run, seconds=60):
    deadline = time.monotonic() + seconds
    while family(run) and time.monotonic() < deadline:
        time.sleep(0.2)
    return not family(run)


@pytest.mark.parametrize(
    "signum", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP], ids=lambda s: s.name
)
def test_a_run_that_is_told_to_stop_saves_and_says_so(data_directory, tmp_path, signum):
    run = tmp_path / "run"
    process = start(data_directory, run)
    process.send_signal(signum)
    assert process.wait(timeout=60) == 0, run.with_suffix(".log").read_text()[-3000:]
    stopped = int((run / "latest_checkpointed_iteration.txt").read_text())
    said = run.with_suffix(".log").read_text()
    assert f"told to stop after iteration {stopped}: saved in {run}" in said and "Traceback" not in said
    assert read_metrics(run)[-1]["iteration"] == stopped
    assert not (run / "run.lock").exists()


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGUSR1], ids=lambda s: s.name)
def test_ranks_whose_launcher_is_gone_save_and_stop(data_directory, tmp_path, monkeypatch, signum):
    run = tmp_path / "run"
    monkeypatch.setenv("LAVER_TEST_RUN", str(run))  # which helpers inherit that do not name the folder
    process = start(data_directory, run, *TORCHRUN, flags="--save-interval 2")
    assert len(family(run)) >= 3  # the launcher, two ranks
    process.send_signal(signum)
    process.wait(timeout=60)
    assert gone(run), family(run)
    stopped = int((run / "latest_checkpointed_iteration.txt").read_text())
    assert read_metrics(run)[-1]["iteration"] == stopped


def test_a_killed_rank_leaves_no_process(data_directory, tmp_path, monkeypatch):
    run = tmp_path / "run"
    monkeypatch.setenv("LAVER_TEST_RUN", str(run))
    process = start(data_directory, run, flags="--save-interval 2 --num-workers 1")
    os.kill(process.pid, signal.SIGKILL)
    process.wait(timeout=60)
    assert gone(run), family(run)


@LONG
def test_a_silent_rank_is_named_and_the_job_ends(data_directory, tmp_path, monkeypatch):
    """One is stopped, not dead: the other says so, shows its stacks and leaves, and torchrun ends both."""
    run = tmp_path / "run"
    monkeypatch.setenv("LAVER_TEST_RUN", str(run))
    process = start(data_directory, run, *TORCHRUN, flags="--silent-rank-timeout 5")
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    stopped = [int(c) for c in children if b"pretrain_laver" in Path(f"/proc/{c}/cmdline").read_bytes()][-1]
    os.kill(stopped, signal.SIGSTOP)
    assert process.wait(timeout=90) == 1  # torchrun gives a stopped one half a minute
    said = run.with_suffix(".log").read_text()
    assert "error: nothing was heard of rank 1 for 5 s" in said, said[-3000:]
    assert "(most recent call first)" in said and "exitcode: 75" in said
    assert gone(run), family(run)


def test_a_second_run_in_the_same_folder_is_refused(data_directory, tmp_path):
    run = tmp_path / "run"
    process = start(data_directory, run)
    try:
        argv = ["--config", str(data_directory / "recipe.yaml"), "--save", str(run), "--load", str(run)]
        second = subprocess.run(
            [sys.executable, "pretrain_laver.py", *argv, *ENDLESS.split()],
            cwd=REPOSITORY, env=environment(), capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
        assert second.returncode == 2
        assert f"error: {run} is being written by process {process.pid} on " in second.stderr
        before = len((run / "metrics.jsonl").read_text().splitlines())
        time.sleep(1)
        assert len((run / "metrics.jsonl").read_text().splitlines()) > before  # the first goes on
    finally:
        process.kill()
        process.wait()


def test_steps_that_are_not_finite_stop_the_run_and_leave_its_checkpoints(data_directory, tmp_path):
    """An absurd rate makes weights of 1e30; what the resume counts goes on where the first run was."""
    run = tmp_path / "run"
    base = [
        sys.executable,
        "pretrain_laver.py",
        "--config",
        str(data_directory / "recipe.yaml"),
        "--save",
        str(run),
    ]
    base += ["--train-iters", "40", "--lr", "1e30", "--no-tensorboard", "--save-interval", "4"]
    ends = {}
    for name, flags in (
        ("first", ["--exit-interval", "4"]),
        ("resumed", ["--load", str(run), "--max-skipped", "5"]),
    ):
        ends[name] = subprocess.run(
            [*base, *flags],
            cwd=REPOSITORY,
            env=environment(),
            capture_output=True,
            text=True,
            timeout=200,
            check=False,
        )
    assert ends["first"].returncode == 0, ends["first"].stderr[-2000:]
    assert ends["resumed"].returncode == 1
    assert (
        "steps in a row, up to iteration" in ends["resumed"].stderr
        and "Traceback" not in ends["resumed"].stderr
    )
    rows = read_metrics(run)
    skipped = [row["skipped"] for row in rows]
    assert skipped == sorted(skipped) and skipped[3] == 3 and skipped[4] == 4
    assert int((run / "latest_checkpointed_iteration.txt").read_text()) == 4
    listed = (run / "skipped.jsonl").read_text().splitlines()
    assert len(listed) == skipped[-1]


def test_a_resume_is_held_to_the_run_that_it_loads(data_directory, tmp_path):
    """Its recipe counts wherever the resumed run is saved, and there must be something left to train."""
    first, second = tmp_path / "first", tmp_path / "second"
    base = [
        sys.executable,
        "pretrain_laver.py",
        "--config",
        str(data_directory / "recipe.yaml"),
        "--no-tensorboard",
    ]

    def end(*flags):
        return subprocess.run(
            [*base, *flags],
            cwd=REPOSITORY,
            env=environment(),
            capture_output=True,
            text=True,
            timeout=200,
            check=False,
        )

    assert end("--save", str(first), "--train-iters", "3").returncode == 0
    for flags, message in (
        (
            ("--lr", "0.5", "--save", str(second)),
            "is a run of another recipe (optimizer.lr was 0.001, now 0.5)",
        ),
        (("--lr", "0.5"), "is a run of another recipe (optimizer.lr was 0.001, now 0.5)"),
        (("--train-iters", "2"), "stands at iteration 3, past train_iters=2"),
    ):
        done = end("--load", str(first), *flags)
        assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr, (
            done.stderr[-2000:]
        )
    assert not second.exists()
    again = end("--load", str(first), "--save", str(first), "--train-iters", "3")  # as a scheduler may
    assert again.returncode == 0 and len(read_metrics(first)) == 3
