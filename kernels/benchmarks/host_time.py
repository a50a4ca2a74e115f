"""Host time of the operations: everything between the call and the GPU, with a launcher that does nothing.

    python kernels/benchmarks/host_time.py                  # microseconds, medians; needs Triton and no GPU
    python kernels/benchmarks/host_time.py --batches 50     # how often random batches have a kernel compiled

Python, autograd, the operators and Triton's own argument handling run as on a Hopper GPU; nothing is compiled and
nothing launched, so that what is left is what a GPU would wait for. Tensors are small: their size costs the host
nothing.
"""

import argparse
import collections
import importlib
import json
import os
import random
import statistics
import sys
import time
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)  # Triton's launches are what is measured
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from laver_kernels import backend, gram_loss, mixed_attention, rope_table
from laver_kernels.testing_masks import image, intervals_of, positions_of, text

BF16 = torch.bfloat16
OPERATIONS = ("mixed_attention", "gram", "latent_cross_entropy", "linear_cross_entropy", "ema")


class Hopper:
    """What Triton asks a driver before it launches."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


class NoKernel:
    """A compiled kernel that does nothing, with what Triton touches of one at a launch."""

    function = packed_metadata = None

    def launch_metadata(self, *arguments: Any) -> None:
        return None

    def run(self, *arguments: Any) -> None:
        return None

    def __getitem__(self, grid: tuple) -> Any:
        assert len(grid) == 3
        stream = driver.active.get_current_stream(driver.active.get_current_device())
        return lambda *arguments: self.run(*grid, stream, *arguments)


def pretend_to_compile() -> collections.Counter:
    """Replaces the compiler and the GPU for the whole process; counts compilations by kernel."""
    compiled: collections.Counter = collections.Counter()

    def keep(self, key, signature, device, constexprs, options, attrs, warmup):
        compiled[self.__name__] += 1
        kernel = NoKernel()
        self.device_caches[device][0][key] = kernel
        return kernel

    JITFunction._do_compile = keep
    driver.set_active(Hopper())
    backend.decide = lambda impl, device, operation="": backend.Decision(impl="triton")  # type: ignore
    for module in [importlib.import_module(f"laver_kernels.{name}.triton") for name in OPERATIONS]:
        if hasattr(module, "architecture"):
            module.architecture = lambda device: "sm_90"  # type: ignore
    return compiled


def attention_call(num_tokens: int, rotate: bool = True):
    """One forward and backward of K1: seven query heads of one key head, so small that no allocation is timed."""
    documents = ((text(4), image(num_tokens // 2), text(num_tokens - num_tokens // 2 - 4)),)
    intervals = intervals_of(documents)
    rope = rope_table(positions_of(documents), 16) if rotate else None
    q, k, v = (torch.zeros(num_tokens, h, 16, dtype=BF16, requires_grad=True) for h in (7, 1, 1))
    upstream = torch.zeros(num_tokens, 7, 16, dtype=BF16)

    def call() -> None:
        out = mixed_attention(q, k, v, intervals, rope, impl="triton")
        torch.autograd.grad(out, (q, k, v), upstream)

    return call


def gram_call(lengths: tuple[int, ...]):
    student = torch.zeros(sum(lengths), 64, dtype=BF16, requires_grad=True)
    teacher = torch.zeros(sum(lengths), 64, dtype=BF16)
    return lambda: torch.autograd.grad(gram_loss(student, teacher, lengths, impl="triton"), student)


def microseconds(call: Any, repeats: int) -> float:
    """Median of one call, in microseconds."""
    for _ in range(20):
        call()
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        call()
        times.append(1e6 * (time.perf_counter() - begin))
    return statistics.median(times)


def launch_by_triton(kernel: Any, grid: tuple, key: tuple | None, *arguments: Any, **constants: Any) -> None:
    """A launch without a memory of the last one."""
    kernel[grid](*arguments, **constants)


def measure(repeats: int) -> dict[str, float]:
    """K1 as it is called, and as before (every call through the operators, every launch by Triton); K2's plan."""
    from laver_kernels.mixed_attention import triton as attention

    now, results = (attention.runs_directly, attention.launch), collections.defaultdict(list)
    calls = {"": attention_call(64), ", not rotated": attention_call(64, rotate=False)}
    for _ in range(3):
        for name, call in calls.items():
            results[f"attention{name}: forward and backward"].append(microseconds(call, repeats))
            attention.runs_directly, attention.launch = (lambda *tensors: False), launch_by_triton
            results[f"attention{name}: as before"].append(microseconds(call, repeats))
            attention.runs_directly, attention.launch = now
    found = {name: min(times) for name, times in results.items()}
    numbers = random.Random(0)
    fresh = iter([tuple(numbers.randrange(200, 1100) for _ in range(64)) for _ in range(40)])
    from laver_kernels.gram import waves

    def plan() -> None:
        waves.plan_of(next(fresh), 128, 128, waves.WORKSPACE_BYTES // 2, torch.device("cpu"))

    times = []
    for _ in range(40):
        begin = time.perf_counter()
        plan()
        times.append(1e6 * (time.perf_counter() - begin))
    found["gram: plan of 64 new lengths"] = statistics.median(times)
    return found


def count_compilations(batches: int, compiled: collections.Counter) -> dict[str, int]:
    """Attention and Gram loss over random batches, as native resolution gives them."""
    numbers = random.Random(0)
    for _ in range(batches):
        attention_call(numbers.randrange(64, 600))()
        gram_call(tuple(numbers.randrange(4, 60) for _ in range(numbers.randrange(1, 6))))()
    return dict(compiled)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=300, help="timed calls of each measurement")
    parser.add_argument(
        "--batches", type=int, default=0, help="count compilations over so many random batches"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args(argv)
    compiled = pretend_to_compile()
    found: dict[str, Any] = (
        count_compilations(arguments.batches, compiled) if arguments.batches else measure(arguments.repeats)
    )
    if arguments.json:
        print(json.dumps(found))
    else:
        print("\n".join(f"{value:>10.1f}  {name}" for name, value in found.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
