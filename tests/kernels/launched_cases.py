"""A script: host code of every operation as on a Hopper GPU, up to the compiler, against what `aot.py` compiles.

Without a GPU and without the interpreter: CPU tensors go through Triton's own specialisation of arguments (types,
values of 1, multiples of 16) for sm_90, and the compiler is not called. Prints one line per difference.
`kernels` has to be on PYTHONPATH.
"""

import importlib
import sys
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from laver_kernels import aot_cases, backend, ema_update_
from laver_kernels.testing import (
    Problem,
    attention_problem,
    gram_problem,
    head_problem,
    latent_problem,
    outputs_and_gradients,
)
from laver_kernels.testing_masks import image, text

BF16 = torch.bfloat16


class Hopper:
    """What Triton asks a driver before it compiles."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


def described(signature: dict, constants: dict, divisible: set[str], tile: Any) -> dict[str, str]:
    """Everything that decides what is compiled, by argument."""
    found = {"num_warps": str(tile.num_warps), "num_stages": str(tile.num_stages)}
    for name, kind in signature.items():
        if kind == "constexpr":
            found[name] = f"constant {constants[name]}"
        else:
            found[name] = f"{kind}, a multiple of 16" if name in divisible else kind
    return found


def expected() -> dict[str, list[dict[str, str]]]:
    """The cases of `aot.py` for sm_90, by kernel."""
    found: dict[str, list[dict[str, str]]] = {}
    for case in aot_cases.all_cases():
        if case.arch == "sm_90":
            signature = case.signature | dict.fromkeys(case.constants, "constexpr")
            found.setdefault(case.kernel.__name__, []).append(
                described(signature, case.constants, set(case.divisible), case.tile)
            )
    return found


def launched(run: Any) -> dict[str, list[dict[str, str]]]:
    """What the JIT would compile for the launches that `run` makes, by kernel."""
    found: dict[str, list[dict[str, str]]] = {}

    def keep(self, key, signature, device, constexprs, options, attrs, warmup):
        names = self.arg_names
        divisible = {names[at[0]] for at, values in attrs.items() if ["tt.divisibility", 16] in values}
        constants = {names[at[0]]: value for at, value in constexprs.items()}
        found.setdefault(self.__name__, []).append(described(signature, constants, divisible, options))

    JITFunction._do_compile = keep
    run()
    return found


def run_all() -> None:
    """Every operation once, at the argument types and divisibilities of the 7B model; attention both ways."""
    attention = importlib.import_module("laver_kernels.mixed_attention.triton")
    documents = ((text(100), image(120), text(36)),)
    problems: list[Problem] = [
        attention_problem("7B", documents, heads=(28, 4), head_dim=128, dtype=BF16),
        gram_problem("7B", (80, 64), width=3584, dtype=BF16),
        latent_problem("7B", 16, (1, 4), width=3584, dtype=BF16),
        head_problem("7B", 16, 1024, dtype=BF16),
    ]
    for problem in problems:
        outputs_and_gradients(problem, problem.ours, impl="triton")
    attention.specialises = lambda device: True  # type: ignore
    outputs_and_gradients(problems[0], problems[0].ours, impl="triton")
    average, source, copy = (torch.zeros(4096, dtype=dtype) for dtype in (torch.float32, BF16, BF16))
    ema_update_(average, source, 0.9, copy, impl="triton")


def main() -> int:
    driver.set_active(Hopper())
    backend.decide = lambda impl, device, operation="": backend.Decision(impl="triton")  # type: ignore
    names = ("mixed_attention", "gram", "latent_cross_entropy", "linear_cross_entropy", "ema")
    for module in [importlib.import_module(f"laver_kernels.{name}.triton") for name in names]:
        if hasattr(module, "architecture"):
            module.architecture = lambda device: "sm_90"  # type: ignore
    want, found, differences = expected(), launched(run_all), 0
    for kernel, launches in found.items():
        for launch in launches:
            nearest = min(want[kernel], key=lambda case: len(case.items() ^ launch.items()), default={})
            for name in sorted({name for name, _ in nearest.items() ^ launch.items()}):
                differences += 1
                print(f"{kernel} {name}: launched as {launch.get(name)}, compiled as {nearest.get(name)}")
    missing = want.keys() - found.keys()
    print(f"Triton {triton.__version__}, {differences} differences, not launched: {sorted(missing)}")
    return differences + len(missing)


if __name__ == "__main__":
    sys.exit(main())
