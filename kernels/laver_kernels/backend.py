"""Which implementation runs: the reference anywhere, Triton where it can."""

import functools
import importlib.util
import logging
import os
from typing import Literal

import torch

Impl = Literal["auto", "triton", "reference"]
IMPLEMENTATIONS = ("auto", "triton", "reference")

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


def choose(impl: str, device: torch.device, operation: str) -> Literal["triton", "reference"]:
    """The backend for one call; `auto` falls back to the reference and says so once, `triton` never does.

    Raises:
        ValueError: unknown `impl`, or `impl="triton"` where Triton is absent or cannot reach `device`.
    """
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"{operation}: impl={impl!r} is unknown; use one of {', '.join(IMPLEMENTATIONS)}")
    if impl == "reference":
        return "reference"
    if not TRITON_IS_INSTALLED:
        if impl == "triton":
            raise ValueError(f"{operation}: impl='triton' needs Triton (pip install 'laver-kernels[triton]')")
        if device.type == "cuda":
            _announce(operation, "Triton is not installed")
        return "reference"
    if device.type == "cuda" or (impl == "triton" and interpreter_is_on()):
        return "triton"
    if impl == "triton":
        raise ValueError(
            f"{operation}: impl='triton' needs CUDA tensors, got {device.type}; on a CPU set "
            "TRITON_INTERPRET=1 before import (for tests), or use impl='reference'"
        )
    _announce(operation, f"the tensors are on {device.type}")
    return "reference"
