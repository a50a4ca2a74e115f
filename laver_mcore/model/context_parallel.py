"""Ulysses: context-parallel ranks exchange their rows for heads around attention (arXiv 2309.14509).

Every rank holds S / CP consecutive rows of all its heads; inside attention it holds all S rows of H / CP heads, so the
mask, positions and kernels are those of the whole sequence. One all-to-all in, one out.
"""

from typing import Any

import torch
import torch.distributed as dist


class _Exchange(torch.autograd.Function):
    """All-to-all of equal slices of the first dimension; its gradient is the same exchange back."""

    @staticmethod
    def forward(ctx: Any, slices: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        slices = slices.contiguous()
        received = torch.empty_like(slices)
        dist.all_to_all_single(received, slices, group=group)
        return received

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _Exchange.apply(grads[0].contiguous(), ctx.group), None


def rows_to_heads(
    query_sHC: torch.Tensor, key_sGC: torch.Tensor, value_sGC: torch.Tensor, group: dist.ProcessGroup
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """From this rank's rows of all heads to all rows of this rank's heads: [s, H, C] -> [S, H / CP, C].

    Key/value heads are repeated where there are fewer of them than ranks.
    """
    size = group.size()
    if key_sGC.shape[1] < size:
        repeats = size // key_sGC.shape[1]
        key_sGC, value_sGC = (t.repeat_interleave(repeats, dim=1) for t in (key_sGC, value_sGC))
    rows, channels = query_sHC.shape[0], query_sHC.shape[2]
    per_rank = [t.view(rows, size, -1, channels) for t in (query_sHC, key_sGC, value_sGC)]
    heads = [t.shape[2] for t in per_rank]
    received = _Exchange.apply(torch.cat(per_rank, dim=2).transpose(0, 1).contiguous(), group)
    query, key, value = received.view(size * rows, sum(heads), channels).split(heads, dim=1)
    return query, key, value


def heads_to_rows(out_ShC: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Back from all rows of this rank's heads to this rank's rows of all heads: [S, H / CP, C] -> [s, H, C]."""
    size = group.size()
    rows, heads, channels = out_ShC.shape[0] // size, out_ShC.shape[1], out_ShC.shape[2]
    received = _Exchange.apply(out_ShC.view(size, rows, heads, channels), group)
    return received.transpose(0, 1).reshape(rows, size * heads, channels)
