"""Benchmarks of the kernels: correctness first, then times against baselines in the same process.

    python kernels/benchmarks/run.py                           # everything; on a GPU writes results/
    python kernels/benchmarks/run.py --only gram --repeats 50  # operations or cases with a word in their name
    python kernels/benchmarks/run.py --check                   # the correctness half alone

Nothing is timed while a check is red. On a CPU only the checks run (through Triton's interpreter): no time
measured there says anything about the kernels.
"""

import argparse
import importlib.util
import os
import sys
import time
from pathlib import Path

import torch

if not torch.cuda.is_available() and importlib.util.find_spec("triton") is not None:
    os.environ["TRITON_INTERPRET"] = "1"  # before the kernels are imported
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import report
import timing
from registry import Benchmark, all_benchmarks

from laver_kernels.testing import measure

RESULTS = Path(__file__).resolve().parent / "results"


def check_all(benchmarks: list[Benchmark], device: str) -> int:
    """Checks each distinct guard once, our kernels where Triton is there; returns the number of failures."""
    impl = "triton" if importlib.util.find_spec("triton") is not None else "reference"
    failures = 0
    seen = set()
    for benchmark in benchmarks:
        problem = benchmark.guard(device)
        key = (problem.name, tuple((name, tuple(x.shape)) for name, x in problem.inputs.items()))
        if key in seen:
            continue
        seen.add(key)
        begin = time.perf_counter()
        try:
            errors = measure(problem, impl)
        except Exception as error:
            failures += 1
            print(f"FAIL  {problem.name:<28} {type(error).__name__}: {error}")
            continue
        worst = max(errors, key=lambda error: error.ours / error.budget)
        word = "ok" if all(error.is_ok for error in errors) else "FAIL"
        failures += word != "ok"
        print(
            f"{word:<6}{problem.name:<28} {impl}: {worst.quantity} errs {worst.ours:.1e} "
            f"of {worst.budget:.1e}, {time.perf_counter() - begin:.1f} s",
            flush=True,
        )
    return failures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="only operations or cases whose name contains this")
    parser.add_argument("--repeats", type=int, default=30, help="timed repetitions of each measurement")
    parser.add_argument("--check", action="store_true", help="check correctness and stop")
    arguments = parser.parse_args()
    chosen = [b for b in all_benchmarks() if arguments.only in f"{b.operation} {b.case}"]
    if not chosen:
        parser.error(f"no benchmark is called {arguments.only!r}")

    device = "cuda" if torch.cuda.is_available() else "cpu"
    failures = check_all(chosen, device)
    if failures:
        print(f"{failures} checks failed: nothing is timed")
        return 1
    if device == "cpu":
        print("No CUDA GPU: the checks passed, and no timing counts here.")
        return 0
    if arguments.check:
        return 0

    machine = report.Machine.here()
    rows = []
    for benchmark in chosen:
        new = timing.time_benchmark(benchmark, machine, arguments.repeats)
        print(report.table(new, header=not rows), flush=True)
        rows += new
        torch.cuda.empty_cache()
    written = report.write(rows, machine, RESULTS, is_partial=bool(arguments.only))
    print("\n".join(f"wrote {path}" for path in written))
    return 0


if __name__ == "__main__":
    sys.exit(main())
