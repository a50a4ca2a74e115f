"""EMA update on Triton: a registered in-place operator over flat memory."""

import torch
import triton
from torch import Tensor

from laver_kernels.ema.kernels import ema_step
from laver_kernels.launch import on_device_of, want_kernel_dtype

BLOCK = 4096


def ema_update_(
    average: Tensor, source: Tensor, momentum: float | Tensor, compute_copy: Tensor | None
) -> None:
    """The operation of `api.ema_update_` for an fp32 average."""
    tensors = (average, source) if compute_copy is None else (average, source, compute_copy)
    want_kernel_dtype("ema_update_", *tensors)
    on_device = momentum if isinstance(momentum, Tensor) else None
    number = 0.0 if isinstance(momentum, Tensor) else float(momentum)
    flat_average = average.contiguous()
    flat_copy = None if compute_copy is None else compute_copy.contiguous()
    update_op(flat_average.view(-1), source.reshape(-1), on_device, number, _flat(flat_copy))
    # A strided view was updated through a dense copy of it.
    if flat_average is not average:
        average.copy_(flat_average)
    if compute_copy is not None and flat_copy is not None and flat_copy is not compute_copy:
        compute_copy.copy_(flat_copy)


def _flat(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.view(-1)


@torch.library.custom_op("laver_kernels::ema_update_", mutates_args=("average", "compute_copy"))
def update_op(
    average: Tensor,
    source: Tensor,
    momentum_on_device: Tensor | None,
    momentum: float,
    compute_copy: Tensor | None,
) -> None:
    """In place over dense 1-D tensors; the momentum tensor wins over the number where given."""
    num_elements = average.numel()
    with on_device_of(average):
        ema_step[(triton.cdiv(num_elements, BLOCK),)](
            average, source.contiguous(), average if compute_copy is None else compute_copy,
            average if momentum_on_device is None else momentum_on_device, momentum, num_elements,
            BLOCK=BLOCK, MOMENTUM_ON_DEVICE=momentum_on_device is not None, HAS_COPY=compute_copy is not None,
            num_warps=8,
        )  # fmt: skip


@update_op.register_fake
def _(average, source, momentum_on_device, momentum, compute_copy):
    return None
