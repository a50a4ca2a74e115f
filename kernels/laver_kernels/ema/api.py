"""The teacher's weights: an exponential moving average kept in fp32 (LaVer, arXiv 2512.06281)."""

import torch
from torch import Tensor

from laver_kernels.backend import Impl, choose
from laver_kernels.checks import FLOATS, want_tensor
from laver_kernels.ema import reference

NAME = "ema_update_"


@torch.no_grad()
def ema_update_(
    average: Tensor,
    source: Tensor,
    momentum: float | Tensor,
    compute_copy: Tensor | None = None,
    *,
    impl: Impl = "auto",
) -> None:
    """In place `average += (1 - momentum) (source - average)`, and its rounding into `compute_copy` if given.

    `average` is fp32 (or fp64) of any shape: a bf16 average would stand still, since at momentum 0.996 its
    steps fall below bf16's resolution. `source` and `compute_copy` have its shape and any float dtype.
    `momentum` lies in [0, 1]: a number, or a tensor of one element that stays on its device.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, or a momentum out of range.
    """
    want_tensor(NAME, "average", average, ("...",) * average.dim(), (torch.float32, torch.float64))
    shape, device = tuple(average.shape), average.device
    want_tensor(NAME, "source", source, shape, FLOATS, device)
    if compute_copy is not None:
        want_tensor(NAME, "compute_copy", compute_copy, shape, FLOATS, device)
    if isinstance(momentum, Tensor):
        if momentum.numel() != 1 or not momentum.is_floating_point():
            raise ValueError(
                f"{NAME}: momentum is {momentum.dtype} {list(momentum.shape)}, want one float element"
            )
        momentum = momentum.reshape(()).to(device, non_blocking=True)
    elif not 0 <= momentum <= 1:
        raise ValueError(f"{NAME}: momentum={momentum}, want within [0, 1]")
    backend = choose(impl, average, NAME)
    if average.numel() == 0:
        return
    if backend == "triton":
        from laver_kernels.ema import triton

        triton.ema_update_(average, source, momentum, compute_copy)
    else:
        reference.ema_update_(average, source, momentum, compute_copy)
