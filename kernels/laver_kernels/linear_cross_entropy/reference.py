"""Language-model head and next-token cross-entropy in plain PyTorch: the specification.

loss = sum over rows of log(sum_v exp(logit_v)) - logit_target, logit = hidden weight^T. With tensor
parallelism every rank holds a range of the vocabulary, and max, sum and target logit are reduced over the
group (vocab-parallel cross-entropy, Megatron-LM, arXiv 1909.08053).
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from laver_kernels.linear_cross_entropy.shard import VocabularyShard


class _CopyToGroup(torch.autograd.Function):
    """Identity forward; backward sums the gradient over the group: each rank saw its own columns only."""

    @staticmethod
    def forward(ctx, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.contiguous().clone()
        dist.all_reduce(grad, group=ctx.group)
        return grad, None


class _SumOverGroup(torch.autograd.Function):
    """Sum over the group forward; backward hands every rank the same gradient."""

    @staticmethod
    def forward(ctx, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        x = x.clone()
        dist.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def linear_cross_entropy(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    loss_weight: Tensor | None,
    shard: VocabularyShard,
    chunk_rows: int,
) -> Tensor:
    """The operation of `api.linear_cross_entropy`, computed in fp32 (fp64 for fp64 inputs)."""
    wide = torch.promote_types(hidden_ND.dtype, torch.float32)
    hidden, weight = hidden_ND.to(wide), weight_VD[: shard.num_real].to(wide)
    if shard.group is not None:
        hidden = _CopyToGroup.apply(hidden, shard.group)
    loss = hidden[:0].sum()
    for start in range(0, len(hidden), chunk_rows):
        rows = slice(start, start + chunk_rows)
        loss = loss + _chunk_loss(hidden[rows] @ weight.T, targets_N[rows], shard)
    return loss if loss_weight is None else loss * loss_weight


def _chunk_loss(logits_NV: Tensor, targets_N: Tensor, shard: VocabularyShard) -> Tensor:
    if shard.group is None:
        return F.cross_entropy(logits_NV, targets_N - shard.start, reduction="sum")
    finite_low = torch.finfo(logits_NV.dtype).min
    with torch.no_grad():
        # A shard of padding alone has no column to take the maximum of.
        max_N = F.pad(logits_NV, (0, 1), value=finite_low).amax(-1)
        dist.all_reduce(max_N, dist.ReduceOp.MAX, group=shard.group)
    shifted_NV = logits_NV - max_N[:, None]
    sum_N = _SumOverGroup.apply(shifted_NV.exp().sum(-1), shard.group)
    local_N = targets_N - shard.start
    is_here = (local_N >= 0) & (local_N < shard.num_real)
    padded_NV = F.pad(shifted_NV, (0, 1))
    picked_N = padded_NV.gather(1, torch.where(is_here, local_N, shard.num_real)[:, None])[:, 0]
    target_N = _SumOverGroup.apply(picked_N, shard.group)
    return (sum_N.log() - target_N).sum()
