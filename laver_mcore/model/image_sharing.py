"""Tensor-parallel ranks of the first stage would all encode the same images: each encodes a share instead."""

from typing import Any

import torch
import torch.distributed as dist


class _GatherShares(torch.autograd.Function):
    """All-gather of unequal shares; backward keeps this rank's slice, for every rank receives the same gradient."""

    @staticmethod
    def forward(
        ctx: Any, local_nD: torch.Tensor, counts: tuple[int, ...], group: dist.ProcessGroup
    ) -> torch.Tensor:
        rank = group.rank()
        ctx.start, ctx.count = sum(counts[:rank]), counts[rank]
        longest = max(counts)
        padded = local_nD.new_zeros(longest, local_nD.shape[1])
        padded[: len(local_nD)] = local_nD
        gathered = local_nD.new_empty(len(counts) * longest, local_nD.shape[1])
        dist.all_gather_into_tensor(gathered, padded, group=group)
        return torch.cat([gathered[i * longest : i * longest + n] for i, n in enumerate(counts)])

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return grads[0][ctx.start : ctx.start + ctx.count].contiguous(), None, None


def gather_shares(local_nD: torch.Tensor, counts: tuple[int, ...], group: dist.ProcessGroup) -> torch.Tensor:
    """Visual tokens of every rank's share of images, in image order: [n, D] of this rank -> [N, D] on all ranks.

    `counts` are the tokens of each rank of `group`, the same on all of them. Parameters used before the gather see
    only this rank's images, so their gradients must be summed over the group (`shared_over_tp`).
    """
    if len(counts) == 1 or max(counts) == 0:
        return local_nD
    return _GatherShares.apply(local_nD, counts, group)
