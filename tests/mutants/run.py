"""Plant faults in the code, one at a time, and see whether the tests notice: `make mutants`.

Faults are chosen by hand (`faults/<area>.yaml`, five texts a line): what matters here is wiring, such as two weights
swapped or a schedule ignored, which the operators of mutmut and cosmic-ray do not produce, and each names the tests
that must notice it, where those tools run one command for every mutant.

A fault is caught if its tests fail (pytest's exit status 1), having passed without it; it survives if they pass. Any
other end is broken, and counts as little: a fault that cannot be imported shows nothing about the tests.
"""

import argparse
import json
import py_compile
import queue
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fault_list import Fault, FaultListError, check_faults, read_faults, short_list
from job import PRELOADED, STRAY

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[1]
LEFT_OUT = {".git", ".venv", "data", "runs", "build", "dist"}
CACHES = shutil.ignore_patterns("__pycache__", ".pytest_cache", ".mypy_cache", ".ruff_cache", "*.egg-info")
SHORT = 20

REASONS: dict[int | None, str] = {
    None: "take too long",
    2: "cannot be collected",
    4: "have arguments that pytest does not understand",
    5: "are none",
    STRAY: "import the project from elsewhere",
}


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What became of one fault."""

    fault: Fault
    verdict: str
    """caught, survived or broken."""
    seconds: float
    why: str = ""


class Job:
    """A process that runs tests in its own copy of the tree (`job.py`)."""

    def __init__(self, tree: Path, copy: Path, preloaded: str) -> None:
        copy_tree(tree, copy)
        self.log = copy.with_name(copy.name + ".log")
        """Output of the tests that ran last."""
        command = [sys.executable, str(HERE / "job.py"), str(copy), preloaded]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def run(self, tests: str, fault: Fault | None, timeout: float) -> dict[str, Any]:
        """Exit status, number of tests passed and seconds; see `job.run_forked`."""
        assert self._process.stdin is not None and self._process.stdout is not None
        request = {
            "arguments": shlex.split(tests),
            "fault": fault.as_json() if fault is not None else None,
            "log": str(self.log),
            "timeout": timeout,
        }
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError("a job has ended; what it wrote stands above")
        found: dict[str, Any] = json.loads(answer)
        return found

    def close(self) -> None:
        """End the process; it stops whatever it runs."""
        self._process.terminate()
        self._process.wait()


def copy_tree(tree: Path, copy: Path) -> None:
    """What tests may read, with bytecode that names its source by hash: it holds for no changed file."""

    def ignore(folder: str, names: list[str]) -> set[str]:
        return set(CACHES(folder, names)) | (LEFT_OUT & set(names) if Path(folder) == tree else set())

    shutil.copytree(tree, copy, ignore=ignore, symlinks=True)
    for path in copy.rglob("*.py"):
        py_compile.compile(str(path), invalidation_mode=py_compile.PycInvalidationMode.CHECKED_HASH, quiet=1)


def in_parallel(jobs: Sequence[Job], items: Iterable[Any], work: Callable[[Job, Any], Any]) -> list[Any]:
    """`work(job, item)` for every item, each job busy with one at a time."""
    free: queue.SimpleQueue[Job] = queue.SimpleQueue()
    for job in jobs:
        free.put(job)

    def one(item: Any) -> Any:
        job = free.get()
        try:
            return work(job, item)
        finally:
            free.put(job)

    with ThreadPoolExecutor(len(jobs)) as pool:
        futures = [pool.submit(one, item) for item in items]
        try:
            return [future.result() for future in futures]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for job in jobs:
                job.close()
            raise


def _end(answer: dict[str, Any], known: dict[int | None, str]) -> str:
    return known.get(answer["code"], f"end with status {answer['code']}")


def _kept(log: Path, place: Path) -> Path:
    place.parent.mkdir(parents=True, exist_ok=True)
    return Path(shutil.copyfile(log, place))


def check_tests(jobs: Sequence[Job], faults: Sequence[Fault], logs: Path, timeout: float) -> dict[str, Any]:
    """Every selection of tests once on the unchanged tree: {selection: (seconds, why it is of no use or "")}."""
    selections = sorted(
        {fault.tests for fault in faults}, key=lambda tests: ("integration" not in tests, tests)
    )

    def work(job: Job, tests: str) -> tuple[str, tuple[float, str]]:
        log = logs / f"unchanged-{selections.index(tests)}.log"
        answer = job.run(tests, None, timeout)
        good = answer["code"] == 0 and answer["passed"] > 0
        why = ""
        if not good:
            ends = REASONS | {0: "are all skipped", 1: "fail"}
            why = f"without the fault, its tests: {_end(answer, ends)}, see {_kept(job.log, log)}"
        print(f"{'passes' if good else 'USELESS':9}{answer['seconds']:7.1f} s  {tests}", flush=True)
        return tests, (answer["seconds"], why)

    return dict(in_parallel(jobs, selections, work))


def plant(
    jobs: Sequence[Job], faults: Sequence[Fault], checked: dict[str, Any], logs: Path, timeout: float
) -> list[Verdict]:
    """Every fault in turn, those with long tests first."""
    in_order = sorted(faults, key=lambda fault: -checked[fault.tests][0])

    def work(job: Job, numbered: tuple[int, Fault]) -> Verdict:
        number, fault = numbered
        if why := checked[fault.tests][1]:
            found = Verdict(fault=fault, verdict="broken", seconds=0.0, why=why)
        else:
            log = logs / f"{fault.area}-{fault.line}.log"
            answer = job.run(fault.tests, fault, timeout)
            verdict = {0: "survived", 1: "caught"}.get(answer["code"], "broken")
            why = ""
            if verdict != "caught":
                end = f"its tests {_end(answer, REASONS)}, " if verdict == "broken" else ""
                why = f"{end}see {_kept(job.log, log)}"
            found = Verdict(fault=fault, verdict=verdict, seconds=answer["seconds"], why=why)
        shown = found.verdict if found.verdict == "caught" else found.verdict.upper()
        counted = f"[{number:3}/{len(in_order)}]"
        print(f"{counted} {shown:9}{found.seconds:7.1f} s  {fault.name}  {found.why}".rstrip(), flush=True)
        return found

    return list(in_parallel(jobs, enumerate(in_order, 1), work))


def summarise(verdicts: Sequence[Verdict], seconds: float) -> dict[str, Any]:
    """The contents of summary.json."""

    def named(verdict: str) -> list[str]:
        return sorted(v.fault.name for v in verdicts if v.verdict == verdict)

    areas: dict[str, dict[str, int]] = {}
    for verdict in sorted(verdicts, key=lambda v: v.fault.area):
        counts = areas.setdefault(verdict.fault.area, {"planted": 0, "caught": 0, "survived": 0, "broken": 0})
        counts["planted"] += 1
        counts[verdict.verdict] += 1
    return {
        "planted": len(verdicts),
        "caught": len(named("caught")),
        "survived": named("survived"),
        "broken": {v.fault.name: v.why for v in verdicts if v.verdict == "broken"},
        "areas": areas,
        "seconds": round(seconds, 1),
        "faults": [
            {
                "name": v.fault.name,
                "verdict": v.verdict,
                "seconds": round(v.seconds, 1),
                "tests": v.fault.tests,
            }
            for v in sorted(verdicts, key=lambda v: v.fault.name)
        ],
    }


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Plant faults and see whether the tests notice.")
    parser.add_argument("--short", action="store_true", help=f"about {SHORT} cheap ones, from every area")
    parser.add_argument("--only", metavar="REGEX", default="", help="faults whose 'area: what' matches")
    parser.add_argument("--jobs", type=int, default=2, help="copies of the tree that run tests at a time")
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds that a fault's tests may take")
    parser.add_argument("--output", type=Path, default=REPOSITORY / "runs" / "mutants" / "summary.json")
    parser.add_argument("--faults", type=Path, default=HERE / "faults", help="folder with the list")
    parser.add_argument(
        "--tree", type=Path, default=REPOSITORY, help="the repository that they are planted in"
    )
    parser.add_argument("--preload", default=PRELOADED, help="modules that a job imports beforehand")
    return parser.parse_args(argv)


def chosen(faults: list[Fault], args: argparse.Namespace) -> list[Fault]:
    """The faults that the options ask for."""
    found = [fault for fault in faults if re.search(args.only, fault.name)]
    return short_list(found, SHORT) if args.short else found


def main(argv: Sequence[str] | None = None) -> int:
    args = arguments(argv)
    start = time.monotonic()
    try:
        faults = read_faults(args.faults)
        if problems := check_faults(faults, args.tree):
            raise FaultListError("\n".join(problems))
        if not (faults := chosen(faults, args)):
            raise FaultListError("no fault to plant")
    except FaultListError as error:
        print(error, file=sys.stderr)
        return 2
    logs = args.output.parent / "logs"
    shutil.rmtree(logs, ignore_errors=True)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="mutants-") as scratch:
        tree, count = args.tree.resolve(), min(args.jobs, len(faults))
        copies = [Path(scratch).resolve() / f"job_{number}" for number in range(count)]
        jobs: list[Job] = []
        try:
            jobs.extend(Job(tree, copy, args.preload) for copy in copies)
            checked = check_tests(jobs, faults, logs, args.timeout)
            verdicts = plant(jobs, faults, checked, logs, args.timeout)
        finally:
            for job in jobs:
                job.close()
    summary = summarise(verdicts, time.monotonic() - start)
    args.output.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    broken = f", {len(summary['broken'])} broken" if summary["broken"] else ""
    counts = f"{summary['planted']} planted, {summary['caught']} caught, {len(summary['survived'])} survived"
    print(f"{counts}{broken} ({summary['seconds']:.0f} s); {args.output}")
    return 0 if summary["caught"] == summary["planted"] else 1


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the copies are removed, the jobs ended
    sys.exit(main())
