"""The batch script against stand-ins for Slurm's commands: what it launches, requeues and refuses."""

import os
import signal
import stat
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
SCRIPT = ROOT / "examples" / "slurm" / "pretrain.sbatch"
SCONTROL = r"""
echo "scontrol $*" >>"$RECORD"
if [ "$1" = show ]; then printf "node7\nnode8\n"; fi
"""
SRUN = """
echo "srun $*" >>"$RECORD"
echo "allocator $PYTORCH_ALLOC_CONF queues ${CUDA_DEVICE_MAX_CONNECTIONS:-free}" >>"$RECORD"
trap "exit 143" TERM
for i in $(seq ${SRUN_TICKS:-0}); do sleep 0.05; done
exit ${SRUN_STATUS:-0}
"""


@pytest.fixture
def launch(tmp_path):
    """Start the script in a folder with a recipe; returns it and where stand-ins record their calls."""
    for name, body in (("scontrol", SCONTROL), ("srun", SRUN)):
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/bin/bash\n{body}\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    (tmp_path / "recipe.yaml").touch()
    record = tmp_path / "record"
    record.touch()

    def start(*arguments, **environment):
        slurm = {
            "SLURM_SUBMIT_DIR": str(tmp_path),
            "SLURM_JOB_ID": "41234",
            "SLURM_JOB_NODELIST": "node[7-8]",
            "SLURM_JOB_NUM_NODES": "2",
            "SLURM_GPUS_ON_NODE": "4",
        }
        path = f"{tmp_path}/bin:{os.environ['PATH']}"
        process = subprocess.Popen(
            ["bash", str(SCRIPT), *arguments],
            env={"PATH": path, "RECORD": str(record), **slurm, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        return process, record

    return start


def test_torchrun_on_every_node_meets_on_the_first_and_resumes(launch):
    process, record = launch("recipe.yaml", "runs/a", "--tensor-model-parallel-size", "4")
    process.communicate(timeout=30)
    assert process.returncode == 0
    (call,) = [line for line in record.read_text().splitlines() if line.startswith("srun")]
    for part in (
        "--kill-on-bad-exit=1",
        "--nnodes=2",
        "--nproc-per-node=4",
        "--rdzv-endpoint=node7:21234",
        "--max-restarts=3",
        "python3 -m torch.distributed.run",
        "pretrain_laver.py --config recipe.yaml --save runs/a --load runs/a",
        "--tensor-model-parallel-size 4",
    ):
        assert part in call
    assert "allocator expandable_segments:True queues free" in record.read_text()


def test_a_container_is_handed_to_srun(launch):
    process, record = launch("recipe.yaml", "runs/a", LAVER_CONTAINER="image.sqsh")
    process.communicate(timeout=30)
    assert "--container-image=image.sqsh" in record.read_text()


def test_failure_is_passed_on_and_not_requeued(launch):
    process, record = launch("recipe.yaml", "runs/a", SRUN_STATUS="2")
    process.communicate(timeout=30)
    assert process.returncode == 2
    assert "requeue" not in record.read_text()


@pytest.mark.parametrize(
    ("number", "status", "requeued"),
    [
        pytest.param(signal.SIGUSR1, 0, True, id="time limit"),
        pytest.param(signal.SIGTERM, 143, False, id="cancelled"),
    ],
)
def test_signals_stop_the_step(launch, number, status, requeued):
    process, record = launch("recipe.yaml", "runs/a", SRUN_TICKS="400")
    deadline = time.monotonic() + 20
    while "srun" not in record.read_text() and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.5)  # for the stand-in to set its trap
    process.send_signal(number)
    process.communicate(timeout=15)
    assert process.returncode == status
    assert ("scontrol requeue 41234" in record.read_text()) == requeued


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param([], "usage: sbatch", id="nothing given"),
        pytest.param(["absent.yaml", "runs/a"], "absent.yaml: no such recipe", id="no recipe"),
    ],
)
def test_bad_arguments_exit_with_status_2(launch, arguments, message):
    process, record = launch(*arguments)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 2
    assert message in output
    assert "srun" not in record.read_text()
