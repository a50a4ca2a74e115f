"""What every Triton launch needs: the right device, precision and dtypes."""

import contextlib
import functools
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from laver_kernels.backend import KERNEL_DTYPES

MAX_ROW_STRIDE = (2**31 - 1) // 128 - 128  # a tile has up to 128 rows


_COMPILED: dict[tuple, tuple[Any, tuple]] = {}
"""What has been launched before, by everything that decides what Triton compiles."""


def regular(tensors: Sequence[Tensor], strides: Sequence[int], sizes: Sequence[int]) -> tuple | None:
    """What else than constants decides which kernel is launched; None where that would take a longer look.

    Triton compiles for types, for multiples of 16 and for values of 1. Nearly always all pointers and strides are
    multiples of 16, and then only the first tensor's type and device and the numbers of tokens remain.
    """
    bits = 0
    for tensor in tensors:
        bits |= tensor.data_ptr()
    for stride in strides:
        bits |= stride
        if stride >= 2**31:
            return None
    if bits & 15:
        return None
    first = tensors[0]
    return first.dtype, first.device.index, *[1 if size == 1 else 16 * (size & 15 == 0) for size in sizes]


def launch(
    kernel: Any, grid: tuple[int, int, int], key: tuple | None, *arguments: Any,
    num_warps: int, num_stages: int, **constants: Any,
) -> None:  # fmt: skip
    """`kernel[grid](*arguments, **constants)`, in a fraction of the time where the same kernel ran before.

    Triton takes 16 microseconds a launch to find the compiled kernel again. `key` is `regular` of the caller's tensors
    (fresh ones are aligned); with None every launch asks Triton. `constants` are the kernel's last arguments.
    """
    full_key = None if key is None else (id(kernel), key, num_warps, num_stages, *constants.values())
    found = _COMPILED.get(full_key) if full_key is not None else None
    if found is not None:
        compiled, tail = found
        compiled[grid](*arguments, *tail)
        return
    compiled = kernel[grid](*arguments, **constants, num_warps=num_warps, num_stages=num_stages)
    if full_key is not None and compiled is not None:  # None: interpreted
        tail = tuple(constants[name] for name in kernel.arg_names[len(arguments) :])
        _COMPILED[full_key] = compiled, tail


def runs_directly(*tensors: Tensor) -> bool:
    """Whether an operation may run without the dispatcher: nothing traces, transforms or watches it.

    The registered operators cost a hundred microseconds a call; what needs them (torch.compile, fake tensors, vmap,
    selective recompute, tensor subclasses) still goes through them.
    """
    return (
        not torch.compiler.is_compiling()
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
        and all(type(x) in (Tensor, torch.nn.Parameter) for x in tensors)
    )


def cdiv(a: int, b: int) -> int:
    """a / b rounded up; Triton's own takes ten microseconds on the host."""
    return -(-a // b)


def on_device_of(tensor: Tensor) -> contextlib.AbstractContextManager:
    """Triton launches on the current device: make it the tensor's."""
    if not tensor.is_cuda or tensor.device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(tensor.device)


@functools.cache
def specialises(device: torch.device) -> bool:
    """Whether warp-specialised kernels run: sm_90, a Triton whose machine code for them was read, not switched off."""
    if device.type != "cuda" or os.environ.get("LAVER_WARP_SPECIALISE") == "0":
        return False
    import triton

    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    return torch.cuda.get_device_capability(device) == (9, 0) and (3, 6) <= version <= (3, 9)


def descriptor_memory(size: int, alignment: int, stream: int | None) -> Tensor:
    """What Triton asks for where a kernel makes tensor descriptors; fresh memory of the current device is aligned."""
    return torch.empty(size, dtype=torch.int8, device="cuda")


def dot_precision(dtype: torch.dtype) -> str:
    """fp32 inputs are multiplied in full fp32; the choice means nothing to 16-bit inputs."""
    return "ieee" if dtype == torch.float32 else "tf32"


def want_kernel_dtype(operation: str, *tensors: Tensor) -> None:
    """Raises ValueError where a dtype has no kernel (fp64)."""
    for tensor in tensors:
        if tensor.dtype not in KERNEL_DTYPES:
            raise ValueError(
                f"{operation}: impl='triton' got {tensor.dtype}, want fp16, bf16 or fp32 "
                "(impl='reference' takes fp64)"
            )


def inner_contiguous(tensor: Tensor) -> Tensor:
    """The tensor itself where its last dimension is dense (strided views of a fused QKV are), else a copy.

    Rows so far apart that a tile's offsets would leave int32 are copied together too.
    """
    is_dense = tensor.stride(-1) == 1 or tensor.shape[-1] == 1
    return tensor if is_dense and tensor.stride(0) <= MAX_ROW_STRIDE else tensor.contiguous()
