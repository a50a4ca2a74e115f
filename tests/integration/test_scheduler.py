"""The batch script under a scheduler that is played: environment, a rank that dies, notice, requeue, the end."""

import os
import signal
import stat
import subprocess
import sys
import time

import pytest
from chaos.run import Run, differences, finish, processes, rows_of
from long import LONG

from integration.harness import REPOSITORY, environment

SCRIPT = REPOSITORY / "examples" / "slurm" / "pretrain.sbatch"
ITERATIONS = 60
# Nodes are loopback addresses; the first one is where all meet.
SCONTROL = r"""
echo "scontrol $*" >>"$RECORD"
if [ "$1" = show ]; then for ((i = 1; i <= SLURM_JOB_NUM_NODES; i++)); do echo "127.0.0.$i"; done; fi
"""
SRUN = """
while [[ $1 == --* ]]; do shift; done
pids=()
for ((i = 0; i < SLURM_JOB_NUM_NODES; i++)); do "$@" & pids+=($!); done
trap 'kill -TERM "${pids[@]}"' TERM
status=0
for pid in "${pids[@]}"; do
    while kill -0 "$pid" 2>/dev/null; do wait "$pid" || status=$?; done
done
exit $status
"""


@pytest.fixture
def submit(data_directory, tmp_path):
    """Start the job, for the first time or again; its run's folder is `tmp_path/run`."""
    for name, body in (("scontrol", SCONTROL), ("srun", SRUN)):
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/bin/bash\n{body}\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)

    def start(nodes, restart):
        slurm = {
            "SLURM_SUBMIT_DIR": str(REPOSITORY),
            "SLURM_JOB_ID": str(os.getpid()),
            "SLURM_JOB_NODELIST": "nodes",
            "SLURM_JOB_NUM_NODES": str(nodes),
            "SLURM_GPUS_ON_NODE": str(2 // nodes),
            "SLURM_RESTART_COUNT": str(restart),
            "LAVER_PYTHON": sys.executable,
            "RECORD": str(tmp_path / "record"),
            "LAVER_CHAOS": str(tmp_path / "run"),
            "PATH": f"{tmp_path}/bin:{os.environ['PATH']}",
        }
        flags = f"--train-iters {ITERATIONS} --save-interval 5 --no-tensorboard --use-distributed-optimizer"
        with (tmp_path / "log").open("ab") as log:
            return subprocess.Popen(
                [
                    "bash",
                    str(SCRIPT),
                    str(data_directory / "recipe.yaml"),
                    str(tmp_path / "run"),
                    *flags.split(),
                ],
                env=environment() | slurm,
                stdout=log,
                stderr=log,
            )

    return start


def come_to(run, iteration, job, log):
    """Wait until the run has written this iteration's metrics."""
    deadline = time.monotonic() + 200
    while max(rows_of(run), default=0) < iteration:
        assert job.poll() is None and time.monotonic() < deadline, log.read_text()[-4000:]
        time.sleep(0.05)


def rank_1(run):
    """The process that trains as rank 1, on the last node."""
    for pid in processes(run):
        with open(f"/proc/{pid}/environ", "rb") as file:
            if b"\0RANK=1\0" in b"\0" + file.read():
                return pid
    raise AssertionError("no rank 1")


@LONG
@pytest.mark.parametrize("nodes", [1, 2])
def test_a_job_under_a_scheduler_ends_as_if_nothing_had_happened(submit, data_directory, tmp_path, nodes):
    run, log = tmp_path / "run", tmp_path / "log"
    job = submit(nodes, 0)
    come_to(run, 7, job, log)
    os.kill(rank_1(run), signal.SIGKILL)
    come_to(run, 14, job, log)  # started anew within the job
    job.send_signal(signal.SIGUSR1)
    assert job.wait(timeout=120) == 0, log.read_text()[-4000:]
    assert f"scontrol requeue {os.getpid()}" in (tmp_path / "record").read_text()
    stopped = int((run / "latest_checkpointed_iteration.txt").read_text())
    assert 14 <= stopped < ITERATIONS and max(rows_of(run)) == stopped
    job = submit(nodes, 1)
    assert job.wait(timeout=300) == 0, log.read_text()[-4000:]
    said = log.read_text()
    assert said.count("resumed from") == 2 and f"resumed from {run} at iteration {stopped}" in said
    calm = Run(tmp_path / "calm", data_directory / "recipe.yaml", "--use-distributed-optimizer", ITERATIONS)
    finish(calm, calm.start())
    assert differences(rows_of(run), rows_of(calm.folder)) == 0
    assert sorted(rows_of(run)) == list(range(1, ITERATIONS + 1))
    assert not processes(run)
