"""Megatron-Core on a machine without CUDA: one place that makes "cuda" mean "cpu" (or "meta").

Megatron-Core writes `device="cuda"` and `torch.cuda.current_device()` throughout, yet everything it does
(process groups, pipeline schedules, distributed optimizer, distributed checkpoints) works on CPU tensors with
gloo. `install()` bridges the difference and is called once, before the first Megatron object is built; where a
GPU is present it must not be called at all.
"""

import contextlib
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


class _CudaAs(TorchFunctionMode):
    """Redirect every explicit CUDA device of a torch call to another device."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device

    def _redirect(self, device: Any) -> Any:
        # bool is an int: `non_blocking=True` passed by position must not be taken for device 1.
        is_index = isinstance(device, int) and not isinstance(device, bool)
        is_cuda = isinstance(device, str | torch.device) and str(device).startswith("cuda")
        return self.device if is_index or is_cuda else device

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        kwargs = kwargs or {}
        if kwargs.get("device") is not None:
            kwargs = {**kwargs, "device": self._redirect(kwargs["device"])}
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            # Megatron's optimizer compares against the names torch.cuda.FloatTensor, torch.cuda.BFloat16Tensor.
            name = func(*args)
            return name if "cuda" in name else name.replace("torch.", "torch.cuda.")
        if func is torch.Tensor.to:
            args = tuple(self._redirect(a) if isinstance(a, str | torch.device) else a for a in args)
        return func(*args, **kwargs)


class _Stream:
    """A CUDA stream on a machine where all work is done when the call returns."""

    def wait_stream(self, *_: object) -> None: ...

    def synchronize(self) -> None: ...


class _RngTracker:
    """Megatron's CUDA RNG tracker for a machine with one generator; dropout draws from torch's own."""

    def fork(self, name: str | None = None) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def is_initialized(self) -> bool:
        return True

    def get_states(self) -> dict[str, torch.Tensor]:
        return {}

    def set_states(self, states: dict[str, torch.Tensor]) -> None: ...

    def add(self, *_: object) -> None: ...

    def reset(self) -> None: ...


_installed: _CudaAs | None = None


def install(device: str = "cpu") -> None:
    """Make Megatron-Core run on `device` ("cpu", or "meta" to build models without allocating their weights)."""
    global _installed
    target = torch.device(device)
    if _installed is not None:
        _installed.device = target
    else:
        import megatron.core.tensor_parallel.random as random

        torch.cuda.synchronize = lambda *_, **__: None  # type: ignore[assignment]
        torch.cuda.current_stream = lambda *_: _Stream()  # type: ignore[assignment,return-value]
        random._CUDA_RNG_STATE_TRACKER = _RngTracker()
        random._CUDA_RNG_STATE_TRACKER_INITIALIZED = True
        # Activation recomputation saves and restores "the CUDA generator": here the CPU's, saved beside it anyway.
        random._get_cuda_rng_state = lambda *_, **__: torch.get_rng_state()
        random._set_cuda_rng_state = lambda *_, **__: None
        _installed = _CudaAs(target)
        _installed.__enter__()
    torch.cuda.current_device = lambda: target  # type: ignore[assignment,return-value]
