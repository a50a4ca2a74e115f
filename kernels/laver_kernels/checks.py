"""Argument checks shared by the operations: one ValueError that names what was given and what was wanted."""

from collections.abc import Sequence

import torch
from torch import Tensor

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def want_tensor(
    operation: str,
    name: str,
    tensor: Tensor,
    shape: Sequence[int | str],
    dtypes: Sequence[torch.dtype] = FLOATS,
    device: torch.device | None = None,
) -> None:
    """Checks a tensor's type, rank, sizes (a string stands for any size), dtype and device."""
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{operation}: {name} is a {type(tensor).__name__}, want a tensor")
    matches = tensor.dim() == len(shape) and all(
        isinstance(want, str) or got == want for got, want in zip(tensor.shape, shape, strict=True)
    )
    if not matches:
        wanted = "[" + ", ".join(str(size) for size in shape) + "]"
        raise ValueError(f"{operation}: {name} has shape {list(tensor.shape)}, want {wanted}")
    if tensor.dtype not in dtypes:
        raise ValueError(f"{operation}: {name} is {tensor.dtype}, want {' or '.join(map(str, dtypes))}")
    if device is not None and tensor.device != device:
        raise ValueError(f"{operation}: {name} is on {tensor.device}, want {device}")


def can_read(tensor: Tensor) -> bool:
    """Whether looking at values is free: a CPU tensor outside a traced graph."""
    is_plain = type(tensor) in (Tensor, torch.nn.Parameter)
    return is_plain and tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype that autocast asks for on this device, or None outside autocast."""
    if not torch.is_autocast_enabled(device.type):
        return None
    return torch.get_autocast_dtype(device.type)
