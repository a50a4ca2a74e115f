"""Ranks of the first stage that hold the same batch would all encode its images: each encodes a share instead."""

from typing import Any

import torch
import torch.distributed as dist


class _GatherShares(torch.autograd.Function):
    """All-gather of unequal shares; backward keeps this rank's slice.

    Every tensor-parallel rank receives the same gradient; those of context-parallel ranks, which work on other rows,
    are summed first.
    """

    @staticmethod
    def forward(
        ctx: Any,
        local_nD: torch.Tensor,
        counts: tuple[int, ...],
        group: dist.ProcessGroup,
        cp_group: dist.ProcessGroup,
    ) -> torch.Tensor:
        rank = group.rank()
        ctx.cp_group = cp_group
        ctx.start, ctx.count = sum(counts[:rank]), counts[rank]
        longest = max(counts)
        padded = local_nD.new_zeros(longest, local_nD.shape[1])
        padded[: len(local_nD)] = local_nD
        gathered = local_nD.new_empty(len(counts) * longest, local_nD.shape[1])
        dist.all_gather_into_tensor(gathered, padded, group=group)
        return torch.cat([gathered[i * longest : i * longest + n] for i, n in enumerate(counts)])

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        grad_ND = grads[0]
        if ctx.cp_group.size() > 1:
            grad_ND = grad_ND.contiguous().clone()
            dist.all_reduce(grad_ND, group=ctx.cp_group)
        return grad_ND[ctx.start : ctx.start + ctx.count].contiguous(), None, None, None


def gather_shares(
    local_nD: torch.Tensor, counts: tuple[int, ...], group: dist.ProcessGroup, cp_group: dist.ProcessGroup
) -> torch.Tensor:
    """Visual tokens of every rank's share of images, in image order: [n, D] of this rank -> [N, D] on all ranks.

    `counts` are the tokens of each rank of `group`, the same on all of them. Parameters used before the gather see
    only this rank's images, so their gradients must be summed over the group (`shared_over_tp`).
    """
    if len(counts) == 1 or max(counts) == 0:
        return local_nD
    return _GatherShares.apply(local_nD, counts, group, cp_group)
