"""Attention over parts of the keys, joined to attention over all of them."""

from collections.abc import Sequence

import torch
from torch import Tensor

LOWEST = -1e30  # stands for -inf, whose differences are no numbers


def merge_attention(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exps of softmax attention over disjoint sets of keys together.

    `outs` are `[..., T, H, D]` and `lses` natural log-sum-exps `[..., H, T]`, as `mixed_attention` gives them with
    `return_lse=True`; differentiable in both. Computed in fp32 or wider, the output in the dtype of the parts. Rows
    that see nothing anywhere give 0 and -inf. Source: ring attention's last sum (arXiv 2310.01889).

    Raises:
        ValueError: no parts, or not as many outputs as log-sum-exps.
    """
    if len(outs) != len(lses) or not outs:
        raise ValueError(
            f"merge_attention: {len(outs)} outputs and {len(lses)} log-sum-exps, want as many, not none"
        )
    lse = torch.stack(list(lses)).clamp(min=LOWEST)
    total = lse.logsumexp(0)
    weights = (lse - total).exp().mT[..., None]
    out = sum(
        (weight * part.to(weight.dtype) for weight, part in zip(weights, outs, strict=True)),
        start=0 * weights[0],
    )
    return out.to(outs[0].dtype), torch.where(total > LOWEST / 2, total, -float("inf"))
