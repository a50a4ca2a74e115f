"""Exponential moving average in plain PyTorch: the specification.

average += (1 - momentum) (source - average)
"""

from torch import Tensor


def ema_update_(
    average: Tensor, source: Tensor, momentum: float | Tensor, compute_copy: Tensor | None
) -> None:
    """The operation of `api.ema_update_`, in the average's precision."""
    step = source.to(average.dtype) - average
    average.add_(step * (1 - momentum))
    if compute_copy is not None:
        compute_copy.copy_(average)
