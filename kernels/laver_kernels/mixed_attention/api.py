"""Mixed attention with 2D-RoPE: text causal, the tokens of an image both ways (LaVer, arXiv 2512.06281)."""

import math

import torch
from torch import Tensor

from laver_kernels.backend import Impl, choose
from laver_kernels.checks import autocast_dtype, want_tensor
from laver_kernels.mixed_attention import blocked
from laver_kernels.mixed_attention.intervals import Intervals

MAX_HEAD_DIM = 128  # beyond it the backward's accumulators no longer fit the registers
NAME = "mixed_attention"


def mixed_attention(
    q_THD: Tensor,
    k_TGD: Tensor,
    v_TGD: Tensor,
    intervals: Intervals,
    rope: tuple[Tensor, Tensor] | None = None,
    *,
    softmax_scale: float | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """Attention over one packed sequence where every row sees one interval of keys, `[T, H, D]` like `q_THD`.

    `k_TGD` and `v_TGD` have G heads, H a multiple of G. `rope` is `rope_table`'s (cos, sin), fp32 `[T, D/2]`,
    and rotates q and k inside. `softmax_scale` defaults to 1 / sqrt(D). Inputs may be strided views. Under
    autocast q, k and v are cast to its dtype. Rows that see nothing give 0 and receive no gradient.

    Raises:
        ValueError: dtypes, shapes or devices that do not fit, a head dimension that is odd or above 128,
            a scale that is not positive, H not a multiple of G, or an interval mask that contradicts itself.
    """
    want_tensor(NAME, "q_THD", q_THD, ("T", "H", "D"))
    dtype = autocast_dtype(q_THD.device)
    if dtype is not None:
        q_THD, k_TGD, v_TGD = (x.to(dtype) if x.is_floating_point() else x for x in (q_THD, k_TGD, v_TGD))
    _check(q_THD, k_TGD, v_TGD, intervals, rope)
    if softmax_scale is None:
        softmax_scale = 1.0 / math.sqrt(q_THD.shape[-1])
    elif not softmax_scale > 0:
        raise ValueError(f"{NAME}: softmax_scale={softmax_scale}, want a positive number")
    backend = choose(impl, q_THD, NAME)
    if q_THD.shape[0] == 0:
        return q_THD + 0 * (k_TGD.sum() + v_TGD.sum())
    if backend == "triton":
        from laver_kernels.mixed_attention import triton

        return triton.mixed_attention(q_THD, k_TGD, v_TGD, intervals, rope, softmax_scale)
    with torch.autocast(q_THD.device.type, enabled=False):
        return blocked.mixed_attention(q_THD, k_TGD, v_TGD, intervals, rope, softmax_scale)


def _check(
    q_THD: Tensor, k_TGD: Tensor, v_TGD: Tensor, intervals: Intervals, rope: tuple[Tensor, Tensor] | None
) -> None:
    num_tokens, num_heads, head_dim = q_THD.shape
    dtypes, device = (q_THD.dtype,), q_THD.device
    want_tensor(NAME, "k_TGD", k_TGD, (num_tokens, "G", head_dim), dtypes, device)
    num_groups = k_TGD.shape[1]
    want_tensor(NAME, "v_TGD", v_TGD, (num_tokens, num_groups, head_dim), dtypes, device)
    if head_dim % 2 or not 2 <= head_dim <= MAX_HEAD_DIM:
        raise ValueError(
            f"{NAME}: head dim {head_dim} is not supported, want an even one up to {MAX_HEAD_DIM}"
        )
    if num_groups == 0 or num_heads % num_groups:
        raise ValueError(
            f"{NAME}: {num_heads} query heads over {num_groups} key/value heads, want a multiple"
        )
    if not isinstance(intervals, Intervals):
        raise ValueError(f"{NAME}: intervals is a {type(intervals).__name__}, want Intervals")
    if len(intervals) != num_tokens or intervals.device != q_THD.device:
        raise ValueError(
            f"{NAME}: intervals of {len(intervals)} tokens on {intervals.device}, "
            f"want {num_tokens} on {q_THD.device}"
        )
    intervals.validate()
    if rope is not None:
        if not isinstance(rope, (tuple, list)) or len(rope) != 2:
            raise ValueError(f"{NAME}: rope is a {type(rope).__name__}, want (cos_TF, sin_TF)")
        for name, table in zip(("rope cos_TF", "rope sin_TF"), rope, strict=True):
            want_tensor(NAME, name, table, (num_tokens, head_dim // 2), (torch.float32,), q_THD.device)
