"""Ahead-of-time gate: compiles every kernel configuration, and models the speed of its loops, without a GPU.

    python kernels/aot.py                 # all of laver_kernels/configs.py; non-zero exit on a miss
    python kernels/aot.py --only forward  # configurations whose name contains a word

Checked: shared memory within the architecture's limit, asynchronous copies present, HGMMA present on sm_90, and on
sm_80 and sm_90 the predicted share of the tensor peak (`performance.py`). sm_89, sm_100 and sm_120 have to compile and
fit. ptxas, cuobjdump and nvdisasm come from Triton's wheel. Triton's cache is a temporary directory: what is measured
was compiled now.
"""

import argparse
import concurrent.futures
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
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
from machine_code import read
from multiprocessor import MACHINES
from performance import LEAST_SHARE, LoopCost, leanest, loop_costs, resident_programs

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
COLUMNS = (
    "kernel", "arch", "tile", "warps", "stages", "regs", "smem KB", "programs", "instrs", "spills", "matrix", "shared",
    "issue", "exp", "barriers", "waits", "cycles", "share", "limiter",
)  # fmt: skip


@dataclass(frozen=True)
class Measured:
    """What the machine code says; `step` is the turn of its leanest matrix loop where the machine is modelled."""

    registers: int
    shared_bytes: int
    programs: int
    instructions: int
    matrix: int
    hgmma: int
    async_copies: int
    loops: list[LoopCost]

    @property
    def step(self) -> LoopCost | None:
        return leanest(self.loops)


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
    compiled = triton.compile(
        source,
        target=GPUTarget("cuda", int(case.arch.removeprefix("sm_")), 32),
        options={"num_warps": case.tile.num_warps, "num_stages": case.tile.num_stages},
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _tool("cuobjdump", "-res-usage", file.name)
        code = read(_tool("nvdisasm", "-c", "-hex", file.name))
    registers, shared = int(re.search(r"REG:(\d+)", usage)[1]), compiled.metadata.shared
    machine = MACHINES.get(case.arch)
    programs, loops = 0, []
    if machine is not None:
        programs = resident_programs(registers, shared, compiled.metadata.num_warps, machine)
        loops = loop_costs(code, case.tile.num_warps, programs, machine)
    return Measured(
        registers=registers,
        shared_bytes=shared,
        programs=programs,
        instructions=len(code.instructions),
        matrix=sum(instruction.is_matrix for instruction in code.instructions),
        hgmma=sum(instruction.name == "HGMMA" for instruction in code.instructions),
        async_copies=sum(instruction.name in ("LDGSTS", "UTMALDG") for instruction in code.instructions),
        loops=loops,
    )


def _tool(name: str, *arguments: str) -> str:
    done = subprocess.run([TOOLS / name, *arguments], capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def misses(case: Case, got: Measured) -> list[str]:
    """What a configuration fails, in words."""
    limit = SHARED_MEMORY_BYTES[case.arch]
    least, step = LEAST_SHARE.get((case.name, case.arch), 0.0), got.step
    share = step.share if step else 0.0
    checks = [
        (got.shared_bytes <= limit, f"shared memory {got.shared_bytes} B > {limit} B"),
        (not case.is_matmul or got.matrix > 0, "no matrix instruction"),
        (not case.is_matmul or got.async_copies > 0, "no asynchronous copy"),
        (not case.is_matmul or case.arch != "sm_90" or got.hgmma > 0, "no HGMMA on sm_90"),
        (share >= least, f"predicted {share:.3f} of the tensor peak < {least}"),
    ]
    return [text for ok, text in checks if not ok]


def row(case: Case, got: Measured) -> tuple[str, ...]:
    tile, step = case.tile, got.step
    size = f"{tile.rows}x{tile.columns}" + (f"x{tile.depth}" if tile.depth else "")
    fixed = (
        case.name, case.arch, size, str(tile.num_warps), str(tile.num_stages), str(got.registers),
        f"{got.shared_bytes / 1024:.0f}",
    )  # fmt: skip
    if step is None:
        return fixed + ("-",) * (len(COLUMNS) - len(fixed))
    cycles = (f"{step.units[unit]:.0f}" for unit in ("matrix", "shared", "issue", "exponential"))
    return (
        *fixed, str(got.programs), str(step.instructions), str(step.spills), *cycles, str(step.barriers),
        str(step.waits), f"{step.cycles:.0f}", f"{step.share:.3f}", step.limiter,
    )  # fmt: skip


def run(cases: list[Case], show: Callable[[str], None] = print) -> int:
    """Prints the table and returns the number of configurations that fell out."""
    width = max(len(case.name) for case in cases)
    form = f"{{:<{width}}} {{:<6}} {{:>10}}" + " {:>8}" * (len(COLUMNS) - 4) + "  {}"
    show(
        f"Triton {triton.__version__}; cycles are of one turn of the leanest loop, all programs of a multiprocessor"
    )
    show(form.format(*COLUMNS))
    failed = 0
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        for case, got in zip(cases, pool.map(compile_case, cases), strict=True):
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
