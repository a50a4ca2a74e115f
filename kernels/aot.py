"""Ahead-of-time gate: compiles every kernel configuration for sm_80 and sm_90, without a GPU.

    python kernels/aot.py                 # all of laver_kernels/configs.py; non-zero exit on a miss
    python kernels/aot.py --only forward  # configurations whose name contains a word

Checked: shared memory within the architecture's limit, no spill instruction inside an innermost loop that
holds matrix instructions, asynchronous copies present, HGMMA present on sm_90. ptxas, cuobjdump and nvdisasm
come from Triton's wheel. Triton's cache is a temporary directory: what is measured was compiled now.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

if os.environ.get("TRITON_INTERPRET") == "1":
    sys.exit("aot: unset TRITON_INTERPRET; interpreted kernels cannot be compiled")
sys.path.insert(0, str(Path(__file__).resolve().parent))

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from laver_kernels.aot_cases import Case, all_cases
from laver_kernels.configs import SHARED_MEMORY_BYTES

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
MATRIX = re.compile(r"\b(?:HMMA|HGMMA)\.")
SPILL = re.compile(r"\b(?:STL|LDL)\b")
COLUMNS = (
    "kernel", "arch", "tile", "warps", "stages", "regs", "stack", "smem KB", "spill", "in loop", "MMA",
    "cp.async", "s",
)  # fmt: skip


@dataclass(frozen=True)
class Measured:
    registers: int
    stack_bytes: int
    shared_bytes: int
    spills: int
    spills_in_mma_loops: int
    matrix: int
    hgmma: int
    async_copies: int
    seconds: float


def compile_case(case: Case) -> Measured:
    """Compiles one configuration and counts what matters in its machine code."""
    names = case.kernel.arg_names
    source = ASTSource(
        fn=case.kernel,
        signature={name: "constexpr" if name in case.constants else case.signature[name] for name in names},
        constexprs=case.constants,
        # Without these hints the loads are not vectorised, and cp.async silently disappears.
        attrs={(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name in case.divisible},
    )
    begin = time.perf_counter()
    compiled = triton.compile(
        source,
        target=GPUTarget("cuda", int(case.arch.removeprefix("sm_")), 32),
        options={"num_warps": case.tile.num_warps, "num_stages": case.tile.num_stages},
    )
    seconds = time.perf_counter() - begin
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _tool("cuobjdump", "-res-usage", file.name)
        lines = _tool("nvdisasm", "-c", file.name).splitlines()
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
    return Measured(
        registers=registers,
        stack_bytes=stack,
        shared_bytes=compiled.metadata.shared,
        spills=sum(bool(SPILL.search(line)) for line in lines),
        spills_in_mma_loops=sum(
            sum(bool(SPILL.search(line)) for line in loop)
            for loop in innermost_loops(lines)
            if any(MATRIX.search(line) for line in loop)
        ),
        matrix=sum(bool(MATRIX.search(line)) for line in lines),
        hgmma=sum("HGMMA." in line for line in lines),
        async_copies=sum("LDGSTS" in line or "UTMALDG" in line for line in lines),
        seconds=seconds,
    )


def _tool(name: str, *arguments: str) -> str:
    done = subprocess.run([TOOLS / name, *arguments], capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def innermost_loops(lines: list[str]) -> Iterator[list[str]]:
    """Instruction lines of every loop that holds no other loop: a label, up to a branch back to it."""
    labels = {match[1]: i for i, line in enumerate(lines) if (match := re.match(r"\s*(\.L\w+):", line))}
    spans = set()
    for i, line in enumerate(lines):
        if "BRA" in line and (match := re.search(r"\(?(\.L\w+)\)?", line)):
            target = labels.get(match[1])
            if target is not None and target < i:
                spans.add((target, i))
    # A branch to itself is the trap after the exit, not a loop.
    spans = {(a, b) for a, b in spans if b - a > 2}
    for a, b in sorted(spans):
        if not any((a, b) != (c, d) and a <= c and d <= b for c, d in spans):
            yield lines[a : b + 1]


def misses(case: Case, got: Measured) -> list[str]:
    """What a configuration fails, in words."""
    limit = SHARED_MEMORY_BYTES[case.arch]
    checks = [
        (got.shared_bytes <= limit, f"shared memory {got.shared_bytes} B > {limit} B"),
        (got.spills_in_mma_loops == 0, f"{got.spills_in_mma_loops} spill instructions in a matrix loop"),
        (not case.is_matmul or got.matrix > 0, "no matrix instruction"),
        (not case.is_matmul or got.async_copies > 0, "no asynchronous copy"),
        (not case.is_matmul or case.arch != "sm_90" or got.hgmma > 0, "no HGMMA on sm_90"),
    ]
    return [text for ok, text in checks if not ok]


def row(case: Case, got: Measured) -> tuple[str, ...]:
    tile = case.tile
    size = f"{tile.rows}x{tile.columns}" + (f"x{tile.depth}" if tile.depth else "")
    return (
        case.name, case.arch, size, str(tile.num_warps), str(tile.num_stages), str(got.registers),
        str(got.stack_bytes), f"{got.shared_bytes / 1024:.0f}", str(got.spills), str(got.spills_in_mma_loops),
        str(got.matrix), str(got.async_copies), f"{got.seconds:.1f}",
    )  # fmt: skip


def run(cases: list[Case], show: Callable[[str], None] = print) -> int:
    """Prints the table and returns the number of configurations that fell out."""
    width = max(len(case.name) for case in cases)
    form = f"{{:<{width}}} {{:<5}} {{:>11}}" + " {:>8}" * (len(COLUMNS) - 3)
    show(f"Triton {triton.__version__}")
    show(form.format(*COLUMNS))
    failed = 0
    for case in cases:
        got = compile_case(case)
        show(form.format(*row(case, got)))
        for text in misses(case, got):
            show(f"    FAILS: {text}")
        failed += bool(misses(case, got))
    show(f"{len(cases)} configurations, {failed} failed")
    return failed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="compile only configurations whose name contains this")
    parser.add_argument("--arch", choices=sorted(SHARED_MEMORY_BYTES), help="one architecture only")
    arguments = parser.parse_args()
    cases = [
        case for case in all_cases() if arguments.only in case.name and arguments.arch in (None, case.arch)
    ]
    if not cases:
        parser.error(f"no configuration is called {arguments.only!r}")
    with tempfile.TemporaryDirectory() as cache, triton.knobs.cache.scope():
        triton.knobs.cache.dir = cache
        return int(run(cases) > 0)


if __name__ == "__main__":
    sys.exit(main())
