"""What mixed attention computes, straight from the equation; every implementation is measured against this.

out_i = sum_j softmax_j(scale * <R_i q_i, R_j k_j>) v_j over the keys j that row i sees, where R is the rotation of
`rope.py` (LaVer, arXiv 2512.06281: mixed attention and 2D-RoPE). Query head h reads key/value head h // (H / G).
"""

import torch
from torch import Tensor


def attention(
    q_THD: Tensor,
    k_TGD: Tensor,
    v_TGD: Tensor,
    mask_TT: Tensor,
    rope: tuple[Tensor, Tensor] | None,
    scale: float,
) -> Tensor:
    """Softmax attention in the dtype of its inputs where `mask_TT` is True; rows that see nothing give 0."""
    if rope is not None:
        q_THD, k_TGD = (rotated(x, *rope) for x in (q_THD, k_TGD))
    group = q_THD.shape[1] // k_TGD.shape[1]
    k_THD, v_THD = (x.repeat_interleave(group, dim=1) for x in (k_TGD, v_TGD))
    score_HTT = scale * torch.einsum("ihd,jhd->hij", q_THD, k_THD)
    # A row of -inf alone has no softmax; whatever it becomes is cleared by the mask.
    lowest = torch.finfo(score_HTT.dtype).min
    p_HTT = score_HTT.masked_fill(~mask_TT, lowest).softmax(-1).masked_fill(~mask_TT, 0)
    return torch.einsum("hij,jhd->ihd", p_HTT, v_THD)


def rotated(x_THD: Tensor, cos_TF: Tensor, sin_TF: Tensor) -> Tensor:
    """Band f turns components f and f + D/2 by its angle, in fp32 or wider, rounded to the dtype of x."""
    wide = torch.promote_types(x_THD.dtype, cos_TF.dtype)
    first, second = x_THD.to(wide).chunk(2, dim=-1)
    cos, sin = (table.to(wide)[:, None] for table in (cos_TF, sin_TF))
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x_THD.dtype)
