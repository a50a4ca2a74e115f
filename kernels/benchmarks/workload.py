"""What a benchmark consists of: a guard that is checked, a workload that is timed, the work that it needs.

A workload's callables take one set of inputs and return the output; `timing.py` takes gradients. Useful
work counts what the equation needs (pairs that the mask shows, one triangle of a symmetric Gram matrix),
whatever an implementation spends.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from baselines import Builder
from torch import Tensor

from laver_kernels.testing import Problem

Inputs = dict[str, Tensor]
BF16 = torch.bfloat16


@dataclass(frozen=True, kw_only=True)
class Work:
    """What the equation needs: matrix FLOPs, and bytes that have to be read and written once."""

    bytes: float
    flops: float = 0.0

    def floor_ms(self, teraflops: float, gigabytes: float) -> float:
        """The shortest time at a machine's matrix rate and copy bandwidth, whichever binds."""
        return max(self.flops / (teraflops * 1e9), self.bytes / (gigabytes * 1e6))


@dataclass(frozen=True, kw_only=True)
class Workload:
    """One operation at one shape on one device."""

    make_inputs: Callable[[int], Inputs]  # seed -> fresh tensors; those of floating dtype get gradients
    ours: Callable[..., Tensor]
    baselines: dict[str, Builder]
    unit: str  # "TF/s" or "GB/s"
    work: dict[str, Work]  # "forward", "backward" or "both"
    extra_times: dict[str, Callable[[], object]] = field(
        default_factory=dict
    )  # timed alone: mask construction


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """A named case: `guard` is checked first, on any device; `build` makes the workload on a device."""

    operation: str
    case: str
    guard: Callable[[str], Problem]  # device -> small problem
    build: Callable[[str], Workload]  # device -> workload
    dtype: str = "bf16"
    is_quick: bool = False  # part of a first look


def random_tensor(shape: tuple[int, ...], seed: int, device: str) -> Tensor:
    """Seeded bf16 numbers, made on the device."""
    generator = torch.Generator(device=device).manual_seed(seed)
    return torch.randn(shape, dtype=BF16, device=device, generator=generator)
