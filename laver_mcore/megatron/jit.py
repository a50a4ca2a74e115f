"""Megatron-Core without torch's compiler: a module of ours stands in for `megatron.core.jit`."""

import functools
import sys
import types
from collections.abc import Callable
from typing import Any


def _compile_when_called(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile an elementwise function at its first call where there is a GPU; elsewhere leave it as written."""

    @functools.cache
    def compiled() -> Callable[..., Any]:
        import torch

        return torch.compile(function) if torch.cuda.is_available() else function

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        return compiled()(*args, **kwargs)

    return call


def start_without_the_compiler() -> None:
    """Let Megatron-Core be imported without loading torch's compiler, which takes seconds in every process.

    Its module of this name wraps fused elementwise functions in `torch.compile` at import; here that waits until one
    of them is called.
    """
    jit = types.ModuleType("megatron.core.jit")
    jit.jit_fuser = _compile_when_called  # type: ignore[attr-defined]
    sys.modules.setdefault("megatron.core.jit", jit)
