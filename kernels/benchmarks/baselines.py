"""What the kernels are timed against, each where its library is installed."""

import importlib.util
import itertools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from laver_kernels import Intervals
from laver_kernels.mixed_attention.rope import rotate
from laver_kernels.testing_masks import Document

GEMMS_ALONE = "gemms alone"
DENSE_MASK_TOKENS = 32768  # beyond it the [T, T] mask of SDPA no longer fits beside the rest


def compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """torch.compile, without a recompilation for every length."""
    return torch.compile(function, dynamic=False)


def attention(
    intervals: Intervals, documents: tuple[Document, ...], rope: tuple[Tensor, Tensor] | None
) -> tuple[dict[str, Callable[..., Tensor]], dict[str, Callable[[], object]]]:
    """FlexAttention, SDPA with a dense mask, flash-attn in two merged calls; and what their masks cost."""
    rotated = compiled(lambda q, k: (rotate(q, *rope), rotate(k, *rope))) if rope is not None else None
    flex, build_block_mask = _flex(intervals)
    found: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {"flex": flex}
    if len(intervals) <= DENSE_MASK_TOKENS:
        found["sdpa dense mask"] = _sdpa(intervals)
    if importlib.util.find_spec("flash_attn") is not None:
        found["fa2 decomposed"] = _flash_decomposed(documents, intervals.device)
    if rotated is None:
        return found, {"flex mask": build_block_mask}

    def after_rotation(function):
        def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            q, k = rotated(q, k)
            return function(q, k, v)

        return call

    return {name: after_rotation(function) for name, function in found.items()}, {
        "flex mask": build_block_mask
    }


def _flex(intervals: Intervals):
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    low, high = intervals.row_lo_T, intervals.row_hi_T
    num_tokens = len(intervals)

    def sees(batch, head, row, key):
        return (key >= low[row]) & (key < high[row])

    def build():
        return create_block_mask(sees, None, None, num_tokens, num_tokens, device="cuda", _compile=True)

    mask = build()
    function = torch.compile(flex_attention, dynamic=False)

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        return function(q, k, v, block_mask=mask, enable_gqa=True)[0].transpose(0, 1)

    return call, build


def _sdpa(intervals: Intervals) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    place = torch.arange(len(intervals), device=intervals.device)
    mask = (place >= intervals.row_lo_T[:, None]) & (place < intervals.row_hi_T[:, None])

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        group = q.shape[1] // k.shape[1]
        k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)[0].transpose(0, 1)

    return call


def merge(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> Tensor:
    """Two attentions over disjoint keys as one: outputs `[T, H, D]`, natural log-sum-exps `[H, T]`."""
    weight = torch.sigmoid(lse_a - lse_b).T[..., None]
    return out_a * weight + out_b * (1 - weight)


def later_image_keys(documents: tuple[Document, ...]) -> tuple[Tensor, Tensor, list[int]]:
    """Queries and keys of the part of the mask above the diagonal, as causal attention over reversed images.

    Query i of an image sees its keys j > i: drop the last query and the first key, turn both round, and it is
    causal. Returns token indices of queries and keys, and cumulative lengths.
    """
    queries: list[int] = []
    keys: list[int] = []
    bounds = [0]
    place = 0
    for document in documents:
        for kind, length in document:
            if kind == "image" and length > 1:
                queries += range(place + length - 2, place - 1, -1)
                keys += range(place + length - 1, place, -1)
                bounds.append(len(queries))
            place += length
    return torch.tensor(queries), torch.tensor(keys), bounds


def _flash_decomposed(documents: tuple[Document, ...], device: torch.device):
    """flash-attn has no such mask: causal over documents, later keys of the same image merged in by LSE."""
    from flash_attn import flash_attn_varlen_func

    bounds = [0]
    for document in documents:
        bounds.append(bounds[-1] + sum(length for _, length in document))
    query_at, key_at, image_bounds = later_image_keys(documents)
    query_at, key_at = query_at.to(device), key_at.to(device)

    def attend(q, k, v, cumulative):
        cu = torch.tensor(cumulative, dtype=torch.int32, device=device)
        longest = max(b - a for a, b in itertools.pairwise(cumulative))
        return flash_attn_varlen_func(q, k, v, cu, cu, longest, longest, causal=True, return_attn_probs=True)[
            :2
        ]

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, lse = attend(q, k, v, bounds)
        if len(query_at) == 0:
            return out
        later, later_lse = attend(q[query_at], k[key_at], v[key_at], image_bounds)
        both = merge(out[query_at], lse[:, query_at], later, later_lse)
        return out.index_copy(0, query_at, both.to(out.dtype))

    return call


def head(targets: Tensor) -> dict[str, Callable[..., Tensor]]:
    """Eager logits of all rows, Liger's fused loss where installed, and the bare matrix products."""
    found: dict[str, Callable[..., Tensor]] = {
        "eager": lambda hidden, weight: F.cross_entropy(
            (hidden @ weight.T).float(), targets, reduction="sum"
        ),
        GEMMS_ALONE: _ThreeProducts.apply,
    }
    if importlib.util.find_spec("liger_kernel") is not None:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        loss = LigerFusedLinearCrossEntropyLoss(reduction="sum")
        found["liger"] = lambda hidden, weight: loss(weight, hidden, targets)
    return found


class _ThreeProducts(torch.autograd.Function):
    """Logits, and both gradients' products, without a loss between: not a result, a floor."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor) -> Tensor:
        logits = hidden @ weight.T
        ctx.save_for_backward(hidden, weight, logits)
        return logits[0, 0].float()

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        hidden, weight, logits = ctx.saved_tensors
        return logits @ weight, logits.T @ hidden
