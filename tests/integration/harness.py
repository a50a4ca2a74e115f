"""Launch real process groups on CPU and read what their runs wrote."""

import functools
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp

REPOSITORY = Path(__file__).resolve().parents[2]


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """One training run: its folder's name and the arguments of `pretrain_laver.py`."""

    name: str
    argv: tuple[str, ...]
    may_fail: bool = False
    spoiled: int | None = None
    """Iteration (from 0) whose pixels are made infinite, so that it must be skipped."""
    record: bool = False
    """Keep every step's micro-batches in `batches.pt` (one rank only)."""


def environment() -> dict[str, str]:
    """One thread a process, and the repository importable."""
    path = os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "kernels")])
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, "TORCH_CPP_LOG_LEVEL": "ERROR"}


def python(
    *argv: str, timeout: float = 240, interpreter: str = sys.executable, **variables: str
) -> subprocess.CompletedProcess[str]:
    """`python argv...` from the repository's root, with these environment variables besides."""
    return subprocess.run(
        [interpreter, *argv],
        cwd=REPOSITORY,
        env=environment() | variables,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def torchrun(
    num_ranks: int, *argv: str, timeout: float = 240, interpreter: str = sys.executable, **variables: str
) -> subprocess.CompletedProcess[str]:
    """`torchrun --nproc-per-node num_ranks argv...` with a rendezvous of its own."""
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_ranks))
    return python(*launcher, *argv, timeout=timeout, interpreter=interpreter, **variables)


def run_scenarios(
    num_ranks: int, directory: Path, scenarios: Sequence[Scenario], interpreter: str = sys.executable
) -> None:
    """Run all scenarios in one launch; run NAME saves under `directory/NAME`."""
    plan = [
        {
            "argv": [*s.argv, "--save", str(directory / s.name), "--no-tensorboard"],
            "may_fail": s.may_fail,
            "error": str(directory / f"{s.name}.error"),
            "spoiled": s.spoiled,
            "record": str(directory / s.name / "batches.pt") if s.record else None,
        }
        for s in scenarios
    ]
    path = directory / f"scenarios_{num_ranks}_{scenarios[0].name}.json"
    path.write_text(json.dumps(plan))
    worker = ("tests/integration/worker.py", str(path))
    timeout = 240 + 20 * len(scenarios)  # many runs in one launch, on machines that do other things as well
    start = functools.partial(torchrun, num_ranks) if num_ranks > 1 else python
    done = start(*worker, timeout=timeout, interpreter=interpreter)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-8000:]


def host_waits(data_directory: Path, folder: Path, flags: str, num_ranks: int = 1) -> dict:
    """What the steps of a short run waited for (`sync_worker.py`); the teacher moves in every step."""
    recipe, output = data_directory / "recipe.yaml", folder / "found.json"
    busy = "" if "--objective" in flags else "--ema-steps 1 --mask-ratio 0.4"
    argv = f"--config {recipe} --train-iters 4 {busy} {flags}".split()
    launcher = f"-m torch.distributed.run --standalone --nproc-per-node {num_ranks}".split()
    done = python(
        *(launcher if num_ranks > 1 else []), "tests/integration/sync_worker.py", str(output), *argv
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(output.read_text())


def read_metrics(run: Path) -> list[dict]:
    """The lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def read_checkpoint(run: Path, prefix: str, iteration: int | None = None) -> dict[str, torch.Tensor]:
    """Whole tensors of a run's newest (or this) checkpoint whose key starts with `prefix`, read without Megatron."""
    if iteration is None:
        iteration = int((run / "latest_checkpointed_iteration.txt").read_text())
    folder = run / f"iter_{iteration:07d}"
    reader = dcp.FileSystemReader(folder)
    metadata = reader.read_metadata().state_dict_metadata
    state = {
        key: torch.empty(entry.size, dtype=entry.properties.dtype)
        for key, entry in metadata.items()
        if key.startswith(prefix) and hasattr(entry, "size")
    }
    dcp.load(state, storage_reader=reader, no_dist=True)
    return state
