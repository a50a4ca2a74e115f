"""Which implementation runs: the reference anywhere, Triton where it can."""

import functools
import importlib.util
import logging
import os
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


def choose(impl: str, tensor: Tensor, operation: str) -> Literal["triton", "reference"]:
    """The backend for one call; `auto` falls back to the reference and says so once, `triton` never does.

    Raises:
        ValueError: unknown `impl`, or `impl="triton"` where no kernel can run on `tensor`.
    """
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"{operation}: impl={impl!r} is unknown; use one of {', '.join(IMPLEMENTATIONS)}")
    if impl == "reference":
        return "reference"
    obstacle = _obstacle(tensor, interpret=impl == "triton" and interpreter_is_on())
    if obstacle is None:
        return "triton"
    if impl == "triton":
        raise ValueError(f"{operation}: impl='triton' {obstacle}")
    _announce(operation, f"Triton {obstacle}")
    return "reference"


def _obstacle(tensor: Tensor, interpret: bool) -> str | None:
    """Why no kernel can run on a tensor, as the end of a sentence about Triton; None where one can."""
    if not TRITON_IS_INSTALLED:
        return "is not installed (pip install 'laver-kernels[triton]')"
    if tensor.device.type != "cuda":
        if not interpret:
            return (
                f"needs CUDA tensors, got {tensor.device.type}; on a CPU use impl='reference', "
                "or set TRITON_INTERPRET=1 before import (for tests)"
            )
    elif torch.version.hip is not None:
        return "has no configurations for AMD GPUs here"
    else:
        capability = torch.cuda.get_device_capability(tensor.device)
        if capability < (8, 0):
            return f"needs sm_80 or newer (bf16 tensor cores), got sm_{capability[0]}{capability[1]}"
    if tensor.dtype not in KERNEL_DTYPES:
        return f"got {tensor.dtype}, want fp16, bf16 or fp32 (impl='reference' takes fp64)"
    return None
