"""Which implementation runs: the reference anywhere, Triton where it can."""

import functools
import importlib.util
import logging
import os
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Impl = Literal["auto", "triton", "reference"]
IMPLEMENTATIONS = ("auto", "triton", "reference")
KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)

logger = logging.getLogger("laver_kernels")


def _find_triton() -> bool:
    """Whether `import triton` would succeed, without importing it."""
    try:
        return importlib.util.find_spec("triton") is not None
    except (ImportError, ValueError):
        return False


TRITON_IS_INSTALLED = _find_triton()


def interpreter_is_on() -> bool:
    """Whether Triton interprets kernels on CPU tensors (to be set before they are imported)."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def _announce(operation: str, reason: str) -> None:
    if torch.compiler.is_compiling():
        return
    logger.warning("%s runs the PyTorch reference: %s", operation, reason)


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What `impl` comes to on a device, and why it is not Triton where it is not."""

    impl: Literal["triton", "reference"]
    obstacle: str | None = None

    def __str__(self) -> str:
        """For a run's first lines: the reason without the advice after it."""
        return self.impl if self.obstacle is None else f"{self.impl} (Triton {self.obstacle.split(';')[0]})"


def decide(impl: str, device: torch.device, operation: str = "kernels") -> Decision:
    """The backend for every call on a device: for a program that decides once, says so, and passes it on.

    Raises:
        ValueError: unknown `impl`, or `impl="triton"` where no kernel can run on the device.
    """
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"{operation}: impl={impl!r} is unknown; use one of {', '.join(IMPLEMENTATIONS)}")
    if impl == "reference":
        return Decision(impl="reference")
    obstacle = _obstacle(device, interpret=impl == "triton" and interpreter_is_on())
    if obstacle is None:
        return Decision(impl="triton")
    if impl == "triton":
        raise ValueError(f"{operation}: impl='triton' {obstacle}")
    return Decision(impl="reference", obstacle=obstacle)


def choose(impl: str, tensor: Tensor, operation: str) -> Literal["triton", "reference"]:
    """The backend for one call; `auto` falls back to the reference and says so once, `triton` never does.

    Raises:
        ValueError: unknown `impl`, or `impl="triton"` where no kernel can run on `tensor`.
    """
    decision = decide(impl, tensor.device, operation)
    obstacle = decision.obstacle
    if decision.impl == "triton" and tensor.dtype not in KERNEL_DTYPES:
        obstacle = f"got {tensor.dtype}, want fp16, bf16 or fp32 (impl='reference' takes fp64)"
        if impl == "triton":
            raise ValueError(f"{operation}: impl='triton' {obstacle}")
    if obstacle is None:
        return decision.impl
    _announce(operation, f"Triton {obstacle}")
    return "reference"


def _obstacle(device: torch.device, interpret: bool) -> str | None:
    """Why no kernel can run on a device, as the end of a sentence about Triton; None where one can."""
    if not TRITON_IS_INSTALLED:
        return "is not installed (pip install 'laver-kernels[triton]')"
    if device.type != "cuda":
        if interpret:
            return None
        return (
            f"needs CUDA tensors, got {device.type}; on a CPU use impl='reference', "
            "or set TRITON_INTERPRET=1 before import (for tests)"
        )
    if torch.version.hip is not None:
        return "has no configurations for AMD GPUs here"
    capability = _capability(device)
    if capability < (8, 0):
        return f"needs sm_80 or newer (bf16 tensor cores), got sm_{capability[0]}{capability[1]}"
    return None


def _capability(device: torch.device) -> tuple[int, int]:
    """Left to itself, torch.compile would write the question into the graph, and break the graph there."""
    return torch.cuda.get_device_capability(device)


# What torch.compiler.assume_constant_result sets, which would load the whole compiler (seconds) at import.
_capability._dynamo_marked_constant = True  # type: ignore[attr-defined]
