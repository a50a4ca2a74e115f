"""Kill ranks of small runs at random moments and start them again: `make chaos`.

Every layout trains once undisturbed and once with one rank after another killed: while it starts, between two steps
and while it saves; it saves beside training and not, in turns. Writes `OUT/summary.json`, after every kill: kills,
restarts, lost_iterations (all of them), most_lost (at once; most_lost_beside where it saves beside training, which may
have gone on for an interval while a save was on its way), mismatches (metrics that differ from the undisturbed run's,
those that were redone included), leftovers (processes that outlived their launcher). Exit status 1 where a number
differs, a process is left, or more was lost than that.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from integration.harness import REPOSITORY, environment
from sample_run import write_recipe, write_sample_data

from laver_mcore.processes import end_with_parent

LAYOUTS = {
    "dp2": "--use-distributed-optimizer",
    "tp2": "--tensor-model-parallel-size 2",
    "pp2": "--pipeline-model-parallel-size 2",
}
SAVE_INTERVAL = 3
STEPS_PER_KILL = 5
PATIENCE = 300.0
"""Seconds for a run to come to where it is killed, or to end."""
TIMED = ("seconds", "per_second", "_ms", "tflops", "mfu", "memory", "share", "wait", "time")
"""Parts of the names of metrics that tell of the machine."""


def rows_of(run: Path) -> dict[int, dict[str, Any]]:
    """Metrics by iteration, without what differs from run to run; a line that a kill cut short is none."""
    found = {}
    file = run / "metrics.jsonl"
    for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else ():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        found[row["iteration"]] = {k: v for k, v in row.items() if not any(part in k for part in TIMED)}
    return found


def saved(run: Path) -> int:
    """Iteration that the run's tracker names, 0 without one."""
    tracker = run / "latest_checkpointed_iteration.txt"
    return int(tracker.read_text(encoding="utf-8")) if tracker.exists() else 0


def processes(run: Path) -> list[int]:
    """Living processes of a run, whoever their parents are now: all inherit a variable that names its folder."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and f"LAVER_CHAOS={run}\0".encode() in (entry / "environ").read_bytes():
                found.append(int(entry.name))
        except OSError:
            continue  # it has just ended
    return found


def ranks(launcher: int) -> list[int]:
    """Processes that train: the launcher's children that run the script."""
    found = []
    for child in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split():
        try:
            if b"pretrain_laver.py" in Path(f"/proc/{child}/cmdline").read_bytes():
                found.append(int(child))
        except OSError:
            continue
    return found


class Run:
    """One layout's run in its folder."""

    def __init__(self, folder: Path, recipe: Path, flags: str, iterations: int) -> None:
        self.folder = folder
        self._argv = ["--config", str(recipe), "--save", str(folder), "--load", str(folder)]
        self._argv += f"--train-iters {iterations} --save-interval {SAVE_INTERVAL} --keep-last 2".split()
        self._argv += ["--no-tensorboard", *flags.split()]

    def start(self, *flags: str, restarts: int = 0) -> subprocess.Popen[bytes]:
        """The launcher, which starts its ranks anew by itself so many times; with these flags besides."""
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        launcher += ["--max-restarts", str(restarts), "pretrain_laver.py"]
        with self.folder.with_suffix(".log").open("ab") as log:
            return subprocess.Popen(
                [sys.executable, *launcher, *self._argv, *flags],
                cwd=REPOSITORY,
                env=environment() | {"LAVER_CHAOS": str(self.folder)},
                stdout=log,
                stderr=log,
                preexec_fn=end_with_parent,
            )

    def leftovers(self, seconds: float = 60.0) -> int:
        """How many processes are left after a while; they are ended then."""
        deadline = time.monotonic() + seconds
        while (found := processes(self.folder)) and time.monotonic() < deadline:
            time.sleep(0.1)
        for pid in found:
            os.kill(pid, signal.SIGKILL)
        return len(found)

    def saving(self) -> bool:
        return any(self.folder.glob("iter_*.saving"))


def wait(condition: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    """Return once `condition` holds; `SystemExit` where the run ends or stands still before."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        if process.poll() is not None or time.monotonic() > deadline:
            raise SystemExit(f"chaos: {process.args} did not come to where it was to be killed; see its log")
        time.sleep(0.002)


def kill(run: Run, process: subprocess.Popen[bytes], number: int, draw: random.Random) -> dict[str, Any]:
    """Kill one rank at a moment of one of three kinds; what was seen."""
    moment, before = ("step", "save", "start")[number % 3], rows_of(run.folder)
    wait(lambda: len(ranks(process.pid)) == 2, process)
    goal = number * STEPS_PER_KILL + draw.randint(1, STEPS_PER_KILL)
    if moment == "start":
        later = time.monotonic() + draw.uniform(0.0, 15.0)
        wait(lambda: time.monotonic() > later or rows_of(run.folder) != before, process)
    else:
        wait(lambda: max(rows_of(run.folder), default=0) >= goal, process)
        if moment == "save":
            wait(run.saving, process)
        time.sleep(draw.uniform(0.0, 0.05 if moment == "save" else 0.5))
    victims = ranks(process.pid)
    victim = draw.randrange(len(victims))
    in_save = run.saving()
    os.kill(victims[victim], signal.SIGKILL)
    process.wait(timeout=PATIENCE)
    rows = rows_of(run.folder)
    # What was lost by the kill before is not lost once more where this run had not come to its first step.
    lost = 0 if rows == before else max(0, max(rows, default=0) - saved(run.folder))
    return {"moment": moment, "rank": victim, "in_save": in_save, "lost": lost, "rows": rows}


def finish(run: Run, process: subprocess.Popen[bytes]) -> None:
    if process.wait(timeout=PATIENCE) != 0:
        raise SystemExit(f"chaos: {run.folder} ended with status {process.returncode}; see {run.folder}.log")


def differences(rows: dict[int, dict[str, Any]], wanted: dict[int, dict[str, Any]]) -> int:
    """Iterations whose metrics are not those of the undisturbed run."""
    return sum(row != wanted.get(iteration) for iteration, row in rows.items())


def chaos(out: Path, layouts: list[str], kills: int, seed: int) -> dict[str, Any]:
    """Kill `kills` times, the layouts taking turns by blocks; returns and writes the summary."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    write_sample_data(out / "data")
    recipe, draw = write_recipe(out / "data"), random.Random(seed)
    total = {"kills": 0, "kills_in_saves": 0, "restarts": 0, "lost_iterations": 0}
    total |= {
        "most_lost": 0,
        "most_lost_beside": 0,
        "mismatches": 0,
        "leftovers": 0,
        "save_interval": SAVE_INTERVAL,
        "seed": seed,
    }
    for place, layout in enumerate(layouts):
        count = kills // len(layouts) + (place < kills % len(layouts))
        iterations = (count + 1) * STEPS_PER_KILL + SAVE_INTERVAL
        calm = Run(out / f"{layout}-calm", recipe, LAYOUTS[layout], iterations)
        finish(calm, calm.start())
        wanted = rows_of(calm.folder)
        run = Run(out / layout, recipe, LAYOUTS[layout], iterations)
        process = run.start("--async-save")
        for number in range(count):
            most = "most_lost" if number % 2 else "most_lost_beside"
            seen = kill(run, process, number, draw)
            total["kills"] += 1
            total["kills_in_saves"] += seen["in_save"]
            total["lost_iterations"] += seen["lost"]
            total[most] = max(total[most], seen["lost"])
            total["mismatches"] += differences(seen["rows"], wanted)
            total["leftovers"] += run.leftovers()
            process = run.start(*(["--async-save"] if number % 2 else []))
            total["restarts"] += 1
            write(out, total)
        finish(run, process)
        last = rows_of(run.folder)
        total["mismatches"] += differences(last, wanted) + len(wanted.keys() - last.keys())
        total["leftovers"] += run.leftovers()
    return write(out, total)


def write(out: Path, total: dict[str, Any]) -> dict[str, Any]:
    (out / "summary.json").write_text(json.dumps(total, indent=1) + "\n", encoding="utf-8")
    return total


def main(argv: list[str]) -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=51)
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=REPOSITORY / "runs" / "chaos")
    args = parser.parse_args(argv)
    found = chaos(args.out.resolve(), args.layouts, args.kills, args.seed)
    print(json.dumps(found))
    return int(broken(found))


def broken(found: dict[str, Any]) -> bool:
    """Whether a summary breaks what is promised."""
    lost = found["most_lost"] > SAVE_INTERVAL or found["most_lost_beside"] > 2 * SAVE_INTERVAL
    return lost or found["mismatches"] > 0 or found["leftovers"] > 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
