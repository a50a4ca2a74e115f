"""Does a long run grow? `make soak`: 2,000 steps of a small run with workers, that saves, looked at every second.

Writes OUT/soak.json: for the processes of the run together, resident memory (MiB), file descriptors and threads, after
a warm-up of a quarter of the steps: where they begin and end, and how fast memory grows, with its standard error. Exit
status 1 where memory grows by more than what is noise, or descriptors or threads do.
"""

import argparse
import json
import math
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from chaos.run import processes, rows_of
from integration.harness import REPOSITORY, environment
from sample_run import write_recipe, write_sample_data

from laver_mcore.processes import end_with_parent

NOISE_MIB = 16.0
"""Growth from the warm-up to the end that allocators and caches make by themselves."""


def sample(run: Path) -> dict[str, float]:
    """What the processes of a run take now; one that ends meanwhile counts as far as it could be read."""
    found = {"processes": 0, "rss_mib": 0.0, "fds": 0, "threads": 0}
    for pid in processes(run):
        try:
            status = dict(
                line.split(":", 1)
                for line in Path(f"/proc/{pid}/status").read_text().splitlines()
                if ":" in line
            )
            found["rss_mib"] += int(status["VmRSS"].split()[0]) / 1024
            found["threads"] += int(status["Threads"])
            found["fds"] += len(list(Path(f"/proc/{pid}/fd").iterdir()))
            found["processes"] += 1
        except (OSError, KeyError):
            continue
    return found


def slope(points: list[tuple[float, float]]) -> tuple[float, float]:
    """Slope of a line through points by least squares, and its standard error."""
    n = len(points)
    mean_x, mean_y = (sum(p[i] for p in points) / n for i in (0, 1))
    spread = sum((x - mean_x) ** 2 for x, _ in points)
    found = sum((x - mean_x) * (y - mean_y) for x, y in points) / spread
    rest = sum((y - mean_y - found * (x - mean_x)) ** 2 for x, y in points)
    return found, math.sqrt(rest / max(1, n - 2) / spread)


def soak(out: Path, steps: int, flags: list[str]) -> dict[str, Any]:
    """Run, look, and say what was seen."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    write_sample_data(out / "data")
    run = out / "run"
    argv = ["--config", str(write_recipe(out / "data")), "--save", str(run), "--train-iters", str(steps)]
    argv += ["--num-workers", "2", "--save-interval", str(steps // 10), "--keep-last", "2", *flags]
    with (out / "run.log").open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "pretrain_laver.py", *argv],
            cwd=REPOSITORY,
            env=environment() | {"LAVER_CHAOS": str(run)},
            stdout=log,
            stderr=log,
            preexec_fn=end_with_parent,
        )
        seen: list[tuple[int, dict[str, float]]] = []
        while process.poll() is None:
            seen.append((max(rows_of(run), default=0), sample(run)))
            time.sleep(1.0)
    if process.returncode != 0:
        raise SystemExit(f"soak: the run ended with status {process.returncode}; see {out / 'run.log'}")
    # Around the median number of processes: a writer comes and goes, and at its end a run takes itself apart.
    later = [(step, found) for step, found in seen if steps / 4 < step < steps]
    usual = sorted(found["processes"] for _, found in later)[len(later) // 2]
    later = [(step, found) for step, found in later if found["processes"] == usual]
    grows, error = slope([(step, found["rss_mib"]) for step, found in later])
    summary = {"steps": steps, "looks": len(later), "processes": usual}
    summary |= {"rss_mib_per_1000_steps": 1000 * grows, "standard_error": 1000 * error}
    tenth = max(1, len(later) // 10)
    for name in ("rss_mib", "fds", "threads"):
        for place, part in (("begins", later[:tenth]), ("ends", later[-tenth:])):
            summary[f"{name}_{place}"] = sorted(found[name] for _, found in part)[len(part) // 2]
    (out / "soak.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    return summary


def grew(found: dict[str, Any]) -> bool:
    """Whether a summary breaks what is promised."""
    grown = (found["rss_mib_per_1000_steps"] - 2 * found["standard_error"]) * 0.75 * found["steps"] / 1000
    more = any(found[f"{name}_ends"] > found[f"{name}_begins"] for name in ("fds", "threads"))
    return grown > NOISE_MIB or more


def main(argv: list[str]) -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--out", type=Path, default=REPOSITORY / "runs" / "soak")
    args, flags = parser.parse_known_args(argv)
    found = soak(args.out.resolve(), args.steps, flags)
    print(json.dumps(found))
    return int(grew(found))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
