"""Benchmarks of the kernels: correctness first, then times against baselines in the same process.

    python kernels/benchmarks/run.py --quick                      # the shapes of the targets, one call
    python kernels/benchmarks/run.py --operations gram_loss ema_update_
    python kernels/benchmarks/run.py --only "TP=4" --minutes 9    # cases with a word in their name, stops in time
    python kernels/benchmarks/run.py --resume --minutes 9         # everything that has no row yet, call after call
    python kernels/benchmarks/run.py --quick --baselines none     # ours alone, without minutes of compiling others
    python kernels/benchmarks/run.py --check                      # the correctness half alone

Nothing is timed while a check is red. On a CPU only the checks run (through Triton's interpreter): no time
measured there says anything about the kernels. Results are written after every case, and a call adds to the
rows that the same commit has on the same GPU. A case that fails is named and costs the others nothing.
"""

import argparse
import dataclasses
import importlib.util
import os
import sys
import time
from pathlib import Path

import torch
import torch._functorch.config

if not torch.cuda.is_available() and importlib.util.find_spec("triton") is not None:
    os.environ["TRITON_INTERPRET"] = "1"  # before the kernels are imported
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import report
import timing
from registry import all_benchmarks
from workload import Benchmark, Workload

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


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    cases = all_benchmarks()
    operations = sorted({benchmark.operation for benchmark in cases})
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--operations", nargs="+", choices=operations, default=operations, metavar="NAME")
    parser.add_argument("--only", default="", help="only operations or cases whose name contains this")
    parser.add_argument("--quick", action="store_true", help="only the shapes that the targets are about")
    parser.add_argument("--repeats", type=int, default=30, help="timed repetitions of each measurement")
    parser.add_argument("--check", action="store_true", help="check correctness and stop")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no case after this long")
    parser.add_argument("--resume", action="store_true", help="skip cases that have their rows already")
    parser.add_argument(
        "--baselines", nargs="+", metavar="NAME", help="time only these beside ours; none: none"
    )
    parser.add_argument("--commit", help="what the rows name as commit, where the sources are no repository")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the results")
    arguments = parser.parse_args(argv)
    arguments.chosen = [
        case
        for case in cases
        if case.operation in arguments.operations
        and arguments.only in f"{case.operation} {case.case}"
        and (case.is_quick or not arguments.quick)
    ]
    if not arguments.chosen:
        parser.error(f"no benchmark is called {arguments.only!r}")
    return arguments


def time_all(
    benchmarks: list[Benchmark], machine: report.Machine, clock: timing.Clock, arguments: argparse.Namespace
) -> int:
    """Times one case after another, prints and writes its rows, stops when the minutes are over; returns failures."""
    begin = time.monotonic()
    rows = {(row.operation, row.case, row.direction): row for row in report.read(machine, arguments.output)}
    if arguments.resume:
        done = {key[:2] for key in rows}
        benchmarks = [b for b in benchmarks if (b.operation, b.case) not in done]
    failures = 0
    written: list[Path] = []
    for number, benchmark in enumerate(benchmarks):
        if time.monotonic() - begin > 60 * arguments.minutes:
            print(f"{len(benchmarks) - number} cases left: call again with --resume")
            break
        benchmark = _with_baselines(benchmark, arguments.baselines)
        try:
            new = timing.time_benchmark(benchmark, machine, arguments.repeats, clock)
        except Exception as error:
            failures += 1
            print(f"FAIL  {benchmark.operation} {benchmark.case}: {timing.reason(error)}", flush=True)
            continue
        print(report.table(new, header=number == 0), flush=True)
        rows |= {(row.operation, row.case, row.direction): row for row in new}
        written = report.write(list(rows.values()), machine, arguments.output)
    print("\n".join(f"wrote {path}" for path in written))
    return failures


def _with_baselines(benchmark: Benchmark, names: list[str] | None) -> Benchmark:
    """The same case beside the named baselines alone; None leaves all."""
    if names is None:
        return benchmark

    def build(device: str) -> Workload:
        made = benchmark.build(device)
        chosen = {name: each for name, each in made.baselines.items() if name in names}
        extra = {name: each for name, each in made.extra_times.items() if name in names}
        return dataclasses.replace(made, baselines=chosen, extra_times=extra)

    return dataclasses.replace(benchmark, build=build)


def main(argv: list[str] | None = None) -> int:
    arguments = parse(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    failures = check_all(arguments.chosen, device)
    if failures:
        print(f"{failures} checks failed: nothing is timed")
        return 1
    if device == "cpu":
        print("No CUDA GPU: the checks passed, and no timing counts here.")
        return 0
    if arguments.check:
        return 0
    # Graphs are kept for several backwards; a compiled one would otherwise give its buffers away in the first.
    torch._functorch.config.donated_buffer = False
    clock = timing.CudaClock()
    teraflops, gigabytes = timing.measure_peaks(clock)
    print(f"measured here: {teraflops:.0f} TF/s bf16 by cuBLAS, {gigabytes:.0f} GB/s by copy", flush=True)
    machine = dataclasses.replace(
        report.Machine.here(arguments.commit), teraflops=teraflops, gigabytes=gigabytes
    )
    return int(time_all(arguments.chosen, machine, clock, arguments) > 0)


if __name__ == "__main__":
    sys.exit(main())
