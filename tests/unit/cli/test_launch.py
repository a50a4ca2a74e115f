"""`--nproc-per-node`: torchrun's launcher without its forty lines; the ranks' own line and status are what is left."""

import os
import subprocess
import sys

import pytest

from laver_mcore.cli.launch import split


@pytest.mark.parametrize(
    ("argv", "processes", "rest"),
    [
        (["a.yaml", "--lr", "1"], None, ["a.yaml", "--lr", "1"]),
        (["--nproc-per-node", "8", "a.yaml", "--lr", "1"], "8", ["a.yaml", "--lr", "1"]),
        (["a.yaml", "--nproc_per_node=gpu", "--save", "x"], "gpu", ["a.yaml", "--save", "x"]),
        (["a.yaml", "--help", "--nnodes", "2"], None, ["a.yaml", "--help"]),
    ],
    ids=str,
)
def test_flags_of_torchrun_are_taken_out(argv, processes, rest):
    flags, left = split(argv)
    assert (flags.nproc_per_node, left) == (processes, rest)


@pytest.mark.parametrize(
    ("argv", "status", "said"),
    [
        (["--nproc-per-node", "2", "nowhere.yaml"], 2, "recipe nowhere.yaml does not exist"),
        (["--nproc-per-node", "x", "nowhere.yaml"], 2, "Unsupported nproc_per_node value: x"),
        (["--nproc-per-node", "2", "--help"], 0, ""),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_refusal_of_ranks_is_one_line(argv, status, said):
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    command = [sys.executable, "-m", "laver_mcore", "train", *argv]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == status
    assert done.stderr == (f"laver train: error: {said}\n" if said else "")
    assert ("usage" in done.stdout) == (not said)
