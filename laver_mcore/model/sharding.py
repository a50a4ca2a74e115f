"""Cutting a whole parameter to the shard of one tensor-parallel rank."""

import torch

GATED = ("linear_fc1.weight", "linear_fc1.lora_b")
"""Names of the parameters that are not cut into contiguous slices."""


def shard(full: torch.Tensor, name: str, dim: int, tp_rank: int, tp_size: int) -> torch.Tensor:
    """The slice of `full` along `dim` that rank `tp_rank` of `tp_size` holds, as Megatron cuts it.

    `name` is the parameter's global name: SwiGLU's gate and up projections lie one above the other in one
    matrix, and every rank holds its slice of the gate above its slice of the up projection.
    """
    if tp_size == 1:
        return full
    if name.endswith(GATED):
        return torch.cat([half.chunk(tp_size, dim)[tp_rank] for half in full.chunk(2, dim)], dim)
    return full.chunk(tp_size, dim)[tp_rank]
