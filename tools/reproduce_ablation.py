"""Train every cell of an ablation, and say which of the paper's findings hold in it.

    python tools/reproduce_ablation.py                                         `make ablation`
    python tools/reproduce_ablation.py --arms both mim ga cga --tasks demo     a part of it

The same command goes on where it was stopped: a finished cell is read, not run again. Writes summary.json and
conclusion.md of whatever is finished, and metrics.jsonl.gz, from which both can be made again.
"""

import contextlib
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from datetime import timedelta
from pathlib import Path

import checkout  # noqa: F401

from laver_mcore.cli.console import refuse, silence_libraries
from laver_mcore.config.errors import ConfigError
from laver_mcore.config.flags import FlagParser
from tools.ablation.setting import RESULT, Cell, Setting, cells_of, load
from tools.ablation.summary import collect, read, write

ROOT = Path(__file__).resolve().parents[1]


def prepare(setting: Setting, cells: Sequence[Cell], output: Path) -> None:
    """The data of every task that has a cell, unless it is there."""
    for task in {cell.task: None for cell in cells}:
        folder = output / "data" / task
        if not (folder / "prepared").is_file():
            tool = (sys.executable, str(ROOT / "tools/prepare_demo.py"))
            subprocess.run([*tool, "--output", str(folder), *setting.tasks[task].prepare], check=True)
            (folder / "prepared").touch()


def _run(cell: Cell, setting: Setting, output: Path) -> None:
    """In a worker, without a line of the run's own."""
    silence_libraries()
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        from tools.ablation.cell import run_cell  # here, as it loads torch, which the parent does without

        run_cell(cell, setting, output)


def run_all(cells: Sequence[Cell], setting: Setting, output: Path, processes: int) -> Iterator[Cell]:
    """Run what is not finished, `processes` at a time, in order as far as starts allow; gives each as it ends."""
    finished = {cell.name for cell in cells if (output / cell.name / RESULT).is_file()}
    waiting = [cell for cell in cells if cell.name not in finished]
    running: dict[Future[None], Cell] = {}
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        try:
            while waiting or running:
                ready = [cell for cell in waiting if cell.start is None or cell.start.name in finished]
                for cell in ready[: processes - len(running)]:
                    waiting.remove(cell)
                    running[pool.submit(_run, cell, setting, output)] = cell
                done, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    cell = running.pop(future)
                    future.result()
                    finished.add(cell.name)
                    yield cell
        except BaseException:
            for process in list((pool._processes or {}).values()):
                process.terminate()  # a cell that is stopped halfway runs again
            raise


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = FlagParser(__doc__)
    parser.add_argument(
        "--setting", type=Path, default=ROOT / "tools/ablation/cpu.yaml", help="what is trained"
    )
    parser.add_argument("--output", type=Path, default=Path("runs/ablation"))
    parser.add_argument(
        "--processes", type=int, default=2, help="cells at a time, one thread each (default: 2)"
    )
    parser.add_argument("--tasks", nargs="+", default=[], help="these alone")
    parser.add_argument("--arms", nargs="+", default=[], help="these alone, in this order")
    parser.add_argument("--seeds", nargs="+", type=int, help="in place of the setting's")
    parser.add_argument("--summarize", action="store_true", help="train nothing, read what is finished")
    parser.add_argument(
        "--metrics",
        type=Path,
        nargs="+",
        help="train nothing, read the metrics.jsonl.gz of other times, together",
    )
    arguments = parser.parse_args(argv)
    try:
        setting = load(arguments.setting, seeds=arguments.seeds)
        cells = cells_of(setting, tasks=arguments.tasks, arms=arguments.arms)
        if arguments.processes < 1:
            raise ConfigError(f"--processes {arguments.processes}: give at least one")
        if not (arguments.summarize or arguments.metrics):
            prepare(setting, cells, arguments.output)
            follow(cells, setting, arguments.output, arguments.processes)
        if arguments.metrics:
            found = [cell for file in arguments.metrics for cell in read(file)]
        else:
            found = collect(setting, arguments.output)
        print(write(setting, arguments.output, found))
    except ConfigError as error:
        return refuse(error)
    return 0


def follow(cells: Sequence[Cell], setting: Setting, output: Path, processes: int) -> None:
    """Run all, a line for each with the time that is left."""
    left = [cell for cell in cells if not (output / cell.name / RESULT).is_file()]
    print(f"{len(cells)} cells, {len(cells) - len(left)} of them finished", flush=True)
    started = time.monotonic()
    for number, cell in enumerate(run_all(cells, setting, output, processes), start=1):
        each = (time.monotonic() - started) / number
        remaining = timedelta(seconds=round(each * (len(left) - number)))
        print(f"{number + len(cells) - len(left)}/{len(cells)} {cell.name}, {remaining} left", flush=True)


if __name__ == "__main__":  # workers import this file again
    sys.exit(main())
