"""What every Triton launch needs: the right device, precision and dtypes."""

import contextlib

import torch
from torch import Tensor

from laver_kernels.backend import KERNEL_DTYPES

MAX_ROW_STRIDE = (2**31 - 1) // 128 - 128  # a tile has up to 128 rows


def on_device_of(tensor: Tensor) -> contextlib.AbstractContextManager:
    """Triton launches on the current device: make it the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


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
