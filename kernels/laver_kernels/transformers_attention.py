"""K1 as an attention of Hugging Face transformers (5 or newer): `attn_implementation="laver"` after `register()`.

    from laver_kernels.transformers_attention import register

    register()
    model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="laver")

Whatever the model masks (causal, padding, packed sequences, image blocks seen both ways, sliding windows), the mask
function turns into intervals once per forward, a few rows at a time; the layers share them. transformers is imported
here alone.
"""

import functools
from typing import Any

import torch
from torch import Tensor, nn

from laver_kernels.backend import Impl
from laver_kernels.mixed_attention.api import mixed_attention
from laver_kernels.mixed_attention.intervals import Intervals

CHUNK_ELEMENTS = 2**24  # of the dense mask at a time
UNSUPPORTED = ("softcap", "position_bias", "s_aux", "head_mask", "cache")


def register(name: str = "laver", impl: Impl = "auto") -> None:
    """Makes `attn_implementation=name` known to transformers, attention and mask function together."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(name, functools.partial(attention_forward, impl=impl))
    AttentionMaskInterface.register(name, intervals_mask)


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Intervals | Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    impl: Impl = "auto",
    **options: Any,
) -> tuple[Tensor, None]:
    """`[B, H, T, D]` in, `[B, T, H, D]` out, as transformers wants it; q and k come rotated.

    `attention_mask` is what `intervals_mask` made; a dense `[B, 1, T_q, T_k]` mask (bool or to be added) is turned
    into intervals when the first layer sees it; None is causal or full, as the module says.

    Raises:
        ValueError: dropout, soft caps, biases or sinks, which K1 does not compute, or a mask that is no intervals.
    """
    asked = [name for name in UNSUPPORTED if options.get(name) is not None] + ["dropout"] * (dropout > 0)
    if asked:
        raise ValueError(f"laver attention computes no {', '.join(asked)}; use attn_implementation='sdpa'")
    batch, _, num_queries, _ = query.shape
    num_keys = key.shape[2]
    if attention_mask is None:
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        intervals = _plain(num_queries, num_keys, bool(causal), query.device)
    elif isinstance(attention_mask, Tensor):
        intervals = _of_dense_once(attention_mask, batch, num_keys)
    else:
        intervals = attention_mask
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    return mixed_attention(q, k, v, intervals, softmax_scale=scaling, impl=impl), None


def intervals_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    attention_mask: Tensor | None = None,
    device: torch.device | str = "cpu",
    use_vmap: bool = False,
    **options: Any,
) -> Intervals:
    """transformers' mask interface: the mask function's rows as intervals of `batch_size` sequences after one another.

    Raises:
        ValueError: a row sees keys with a gap between them, or rows whose bounds fall.
    """
    from transformers.masking_utils import causal_mask_function, sdpa_mask

    mask_function = options.get("mask_function", causal_mask_function)

    def rows(start: int, end: int) -> Tensor:
        return sdpa_mask(
            batch_size=batch_size,
            q_length=end - start,
            kv_length=kv_length,
            q_offset=q_offset + start,
            kv_offset=kv_offset,
            mask_function=mask_function,
            attention_mask=attention_mask,
            allow_is_causal_skip=False,
            use_vmap=use_vmap,
            device=device,
        )[:, 0]

    step = max(1, CHUNK_ELEMENTS // max(1, batch_size * kv_length))
    chunks = [rows(start, min(start + step, q_length)) for start in range(0, q_length, step)]
    return _joined([_bounds(chunk) for chunk in chunks], batch_size, kv_length)


def _bounds(sees_BQK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """First key and one past the last that a row sees, `[B, Q]` (0, 0 if none), and whether one between is hidden."""
    num_keys = sees_BQK.shape[-1]
    count = sees_BQK.sum(-1)
    lo = sees_BQK.int().argmax(-1)
    hi = torch.where(count > 0, num_keys - sees_BQK.flip(-1).int().argmax(-1), 0)
    return lo, hi, (hi - lo != count) & (count > 0)


def _joined(chunks: list[tuple[Tensor, Tensor, Tensor]], batch: int, num_keys: int) -> Intervals:
    lo_BQ, hi_BQ, has_gap_BQ = (torch.cat(parts, dim=1) for parts in zip(*chunks, strict=True))
    live_BQ = lo_BQ < hi_BQ
    # Empty rows stand between others without a say in the order.
    falls_BQ = live_BQ & ((lo_BQ < _highest(lo_BQ, live_BQ)) | (hi_BQ < _highest(hi_BQ, live_BQ)))
    wrong = (has_gap_BQ | falls_BQ).nonzero()  # one wait for the device, once per forward
    if len(wrong):
        sequence, row = wrong[0].tolist()
        raise ValueError(
            f"laver attention: row {row} of sequence {sequence} sees keys that are no interval, or less than a row "
            "before it; use attn_implementation='sdpa' for this mask"
        )
    start_B1 = num_keys * torch.arange(batch, device=lo_BQ.device)[:, None]
    lo_T, hi_T = ((bound + start_B1 * live_BQ).flatten().int() for bound in (lo_BQ, hi_BQ))
    return Intervals.from_rows(lo_T, hi_T, num_keys=batch * num_keys)


def _highest(bound_BQ: Tensor, live_BQ: Tensor) -> Tensor:
    return torch.where(live_BQ, bound_BQ, 0).cummax(-1).values


def _of_dense_once(mask_B1QK: Tensor, batch: int, num_keys: int) -> Intervals:
    """A dense mask's intervals, remembered on it: every layer is given the same tensor."""
    known = getattr(mask_B1QK, "_laver_intervals", None)
    if known is None:
        if mask_B1QK.dim() != 4 or mask_B1QK.shape[1] != 1:
            raise ValueError(f"laver attention: mask of shape {list(mask_B1QK.shape)}, want [B, 1, T_q, T_k]")
        sees = mask_B1QK if mask_B1QK.dtype == torch.bool else mask_B1QK == 0
        known = _joined([_bounds(sees[:, 0, :, :num_keys].expand(batch, -1, -1))], batch, num_keys)
        mask_B1QK._laver_intervals = known  # type: ignore[attr-defined]
    return known


@functools.lru_cache(maxsize=32)
def _plain(num_queries: int, num_keys: int, causal: bool, device: torch.device) -> Intervals:
    """Without a mask: the queries are the last of the keys, causal where there are several; or all see all."""
    row = torch.arange(num_queries, dtype=torch.int32, device=device)
    hi = row + 1 + num_keys - num_queries if causal and num_queries > 1 else torch.full_like(row, num_keys)
    return Intervals.from_rows(torch.zeros_like(row), hi, num_keys=num_keys)
