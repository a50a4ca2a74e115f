"""Mixed attention with 2D-RoPE: text causal, the tokens of an image both ways (LaVer, arXiv 2512.06281)."""

import math
from typing import Literal, overload

import torch
from torch import Tensor

from laver_kernels.backend import Impl, choose
from laver_kernels.checks import autocast_dtype, want_tensor
from laver_kernels.mixed_attention import blocked
from laver_kernels.mixed_attention.intervals import Intervals

MAX_HEAD_DIM = 128  # beyond it the backward's accumulators no longer fit the registers
NAME = "mixed_attention"


@overload
def mixed_attention(
    q_THD: Tensor,
    k_TGD: Tensor,
    v_TGD: Tensor,
    intervals: Intervals,
    rope: tuple[Tensor, Tensor] | None = None,
    *,
    softmax_scale: float | None = None,
    return_lse: Literal[False] = False,
    impl: Impl = "auto",
) -> Tensor: ...
@overload
def mixed_attention(
    q_THD: Tensor,
    k_TGD: Tensor,
    v_TGD: Tensor,
    intervals: Intervals,
    rope: tuple[Tensor, Tensor] | None = None,
    *,
    softmax_scale: float | None = None,
    return_lse: Literal[True],
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor]: ...
def mixed_attention(
    q_THD: Tensor,
    k_TGD: Tensor,
    v_TGD: Tensor,
    intervals: Intervals,
    rope: tuple[Tensor, Tensor] | None = None,
    *,
    softmax_scale: float | None = None,
    return_lse: bool = False,
    impl: Impl = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention over one packed sequence where every row sees one interval of keys, `[T, H, D]` like `q_THD`.

    `k_TGD` and `v_TGD` have G heads, H a multiple of G, and as many tokens as the intervals have columns.
    `rope` is `rope_table`'s (cos, sin), fp32 `[T, D/2]`, and rotates q and k inside; where there are fewer queries
    than keys (a KV cache) both come rotated. `softmax_scale` defaults to 1 / sqrt(D). Inputs may be strided views.
    Under autocast q, k and v are cast to its dtype. Rows that see nothing give 0 and receive no gradient.
    `return_lse` adds the natural log-sum-exps of the scores, fp32 `[H, T]`, differentiable, -inf for rows that see
    nothing: what `merge_attention` joins attention over parts of the keys with.

    Batched: `[B, T, H, D]` in and out, lse `[B, H, T]`. The intervals have T rows, the same for all sequences, or B * T
    (`Intervals.cat`); `rope` likewise.

    Raises:
        ValueError: dtypes, shapes or devices that do not fit, a head dimension that is odd or above 128,
            a scale that is not positive, H not a multiple of G, or an interval mask that contradicts itself.
    """
    if isinstance(q_THD, Tensor) and q_THD.dim() == 4:
        return _batched(q_THD, k_TGD, v_TGD, intervals, rope, softmax_scale, return_lse, impl)
    want_tensor(NAME, "q_THD", q_THD, ("T", "H", "D"))
    dtype = autocast_dtype(q_THD.device)
    if dtype is not None:
        q_THD, k_TGD, v_TGD = (x.to(dtype) if x.is_floating_point() else x for x in (q_THD, k_TGD, v_TGD))
    _check_once(q_THD, k_TGD, v_TGD, intervals, rope)
    if softmax_scale is None:
        softmax_scale = 1.0 / math.sqrt(q_THD.shape[-1])
    elif not softmax_scale > 0:
        raise ValueError(f"{NAME}: softmax_scale={softmax_scale}, want a positive number")
    backend = choose(impl, q_THD, NAME)
    arguments = (q_THD, k_TGD, v_TGD, intervals, rope, softmax_scale, return_lse)
    lse_HT: Tensor | None
    if q_THD.shape[0] == 0 or k_TGD.shape[0] == 0:
        out_THD, lse_HT = _nothing(q_THD, k_TGD, v_TGD)
    elif backend == "triton":
        from laver_kernels.mixed_attention import triton

        out_THD, lse_HT = triton.mixed_attention(*arguments)
    else:
        with torch.autocast(q_THD.device.type, enabled=False):
            out_THD, lse_HT = blocked.mixed_attention(*arguments)
    return (out_THD, lse_HT) if return_lse and lse_HT is not None else out_THD


def _nothing(q_THD: Tensor, k_TGD: Tensor, v_TGD: Tensor) -> tuple[Tensor, Tensor]:
    """No queries, or no keys for them to see."""
    lse_HT = q_THD.new_full(q_THD.shape[1::-1], -float("inf"), dtype=torch.float32)
    return 0 * (q_THD + k_TGD.sum() + v_TGD.sum()), lse_HT


def _batched(
    q_BTHD: Tensor,
    k_BTGD: Tensor,
    v_BTGD: Tensor,
    intervals: Intervals,
    rope: tuple[Tensor, Tensor] | None,
    softmax_scale: float | None,
    return_lse: bool,
    impl: Impl,
) -> Tensor | tuple[Tensor, Tensor]:
    """A batch is a packed sequence whose documents are the sequences."""
    batch, num_tokens, num_heads, head_dim = q_BTHD.shape
    for name, x in (("k_BTGD", k_BTGD), ("v_BTGD", v_BTGD)):
        want_tensor(NAME, name, x, (batch, "T", "G", head_dim))
    if isinstance(intervals, Intervals) and len(intervals) == num_tokens:
        intervals = intervals.repeated(batch)
    if isinstance(rope, (tuple, list)) and batch > 1:
        rope = tuple(table.repeat(batch, 1) if len(table) == num_tokens else table for table in rope)  # type: ignore
    q_THD, k_TGD, v_TGD = (x.flatten(0, 1) for x in (q_BTHD, k_BTGD, v_BTGD))
    shape, options = (batch, num_tokens, num_heads, head_dim), {"softmax_scale": softmax_scale, "impl": impl}
    if not return_lse:
        return mixed_attention(q_THD, k_TGD, v_TGD, intervals, rope, **options).view(shape)  # type: ignore
    out_THD, lse_HT = mixed_attention(q_THD, k_TGD, v_TGD, intervals, rope, return_lse=True, **options)  # type: ignore
    return out_THD.view(shape), lse_HT.view(num_heads, batch, num_tokens).transpose(0, 1)


def _check_once(
    q_THD: Tensor, k_TGD: Tensor, v_TGD: Tensor, intervals: Intervals, rope: tuple[Tensor, Tensor] | None
) -> None:
    """The checks, which every layer would repeat on the same shapes with the same mask and table."""
    tables = rope if isinstance(rope, (tuple, list)) else ()
    tensors = (q_THD, k_TGD, v_TGD, *tables)
    no_pair = rope is not None and len(tables) != 2
    if no_pair or torch.compiler.is_compiling() or not all(isinstance(x, Tensor) for x in tensors):
        return _check(q_THD, k_TGD, v_TGD, intervals, rope)
    seen = intervals.__dict__.setdefault("_checked", set()) if isinstance(intervals, Intervals) else set()
    signature = tuple((x.shape, x.dtype, x.device) for x in tensors)
    if signature not in seen:
        _check(q_THD, k_TGD, v_TGD, intervals, rope)
        seen.add(signature)
    return None


def _check(
    q_THD: Tensor, k_TGD: Tensor, v_TGD: Tensor, intervals: Intervals, rope: tuple[Tensor, Tensor] | None
) -> None:
    num_tokens, num_heads, head_dim = q_THD.shape
    dtypes, device = (q_THD.dtype,), q_THD.device
    fits = isinstance(intervals, Intervals) and len(intervals) == num_tokens
    num_keys = intervals.num_keys if fits else num_tokens
    want_tensor(NAME, "k_TGD", k_TGD, (num_keys, "G", head_dim), dtypes, device)
    num_groups = k_TGD.shape[1]
    want_tensor(NAME, "v_TGD", v_TGD, (num_keys, num_groups, head_dim), dtypes, device)
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
        if num_keys != num_tokens:
            raise ValueError(
                f"{NAME}: rope with {num_tokens} queries and {num_keys} keys, want as many of both; "
                "rotate q and k before (laver_kernels.rotate)"
            )
        if not isinstance(rope, (tuple, list)) or len(rope) != 2:
            raise ValueError(f"{NAME}: rope is a {type(rope).__name__}, want (cos_TF, sin_TF)")
        for name, table in zip(("rope cos_TF", "rope sin_TF"), rope, strict=True):
            want_tensor(NAME, name, table, (num_tokens, head_dim // 2), (torch.float32,), q_THD.device)
