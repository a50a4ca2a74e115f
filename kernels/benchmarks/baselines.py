"""What the kernels are timed against, each where its library is installed."""

import importlib.util
import itertools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from laver_kernels import Intervals
from laver_kernels.mixed_attention.rope import rotate
from laver_kernels.testing_masks import Document

Builder = Callable[[], Callable[..., Tensor]]
"""Makes a baseline when its turn comes: building one may compile, allocate, or fail."""

GEMMS_ALONE = "gemms alone"


class LeftOut(Exception):
    """A baseline that is not run here, with the reason."""


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """torch.compile for the shapes at hand."""
    return torch.compile(function, dynamic=False)


def where_installed(module: str, builder: Callable[[], Callable[..., Tensor]]) -> Builder:
    """The baseline of an optional library, named even where the library is not."""

    def build() -> Callable[..., Tensor]:
        if importlib.util.find_spec(module) is None:
            raise LeftOut(f"{module} is not installed")
        return builder()

    return build


def attention(
    intervals: Intervals, documents: tuple[Document, ...], rope: tuple[Tensor, Tensor] | None
) -> tuple[dict[str, Builder], dict[str, Callable[[], object]]]:
    """FlexAttention, SDPA with a dense mask, flash-attn in two merged calls; and what their masks cost."""
    found: dict[str, Builder] = {
        "flex": lambda: _flex(intervals),
        "sdpa dense mask": lambda: _sdpa(intervals),
        "fa2 decomposed": where_installed(
            "flash_attn", lambda: _flash_decomposed(documents, intervals.device)
        ),
    }
    if rope is not None:
        found = {name: _after_rotation(build, rope) for name, build in found.items()}
    return found, {"flex mask": block_mask_builder(intervals)}


def _after_rotation(build: Builder, rope: tuple[Tensor, Tensor]) -> Builder:
    def build_rotated() -> Callable[..., Tensor]:
        function = build()
        rotated = compiled(lambda q, k: (rotate(q, *rope), rotate(k, *rope)))
        return lambda q, k, v: function(*rotated(q, k), v)

    return build_rotated


def block_mask_builder(intervals: Intervals) -> Callable[[], Any]:
    """FlexAttention's block mask of the intervals, by a compiled call: uncompiled it holds the [T, T] mask."""
    from torch.nn.attention.flex_attention import create_block_mask

    low, high = intervals.row_lo_T, intervals.row_hi_T
    num_tokens, device = len(intervals), str(intervals.device)

    def sees(batch, head, row, key):
        return (key >= low[row]) & (key < high[row])

    create = compiled(create_block_mask)
    return lambda: create(sees, None, None, num_tokens, num_tokens, device)


def _flex(intervals: Intervals) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    mask = block_mask_builder(intervals)()
    function = compiled(flex_attention)

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        return function(q, k, v, block_mask=mask, enable_gqa=True)[0].transpose(0, 1)

    return call


def dense_mask_bytes(num_tokens: int) -> int:
    """The mask as bool, and as the bias in 16 bits that SDPA makes of it, forward and backward."""
    return 5 * num_tokens**2


def _sdpa(intervals: Intervals) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    if intervals.device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(intervals.device)
        wanted = dense_mask_bytes(len(intervals))
        if wanted > free // 2:
            raise LeftOut(f"a [T, T] mask and bias take {wanted / 1e9:.0f} GB of {free / 1e9:.0f} GB free")
    place = torch.arange(len(intervals), device=intervals.device)
    mask = (place >= intervals.row_lo_T[:, None]) & (place < intervals.row_hi_T[:, None])

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        # Repeated by hand: with enable_gqa and a mask SDPA has only its unfused path.
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

    def attend(q, k, v, lengths):
        cumulative, longest = lengths
        out, lse, *_ = flash_attn_varlen_func(
            q, k, v, cumulative, cumulative, longest, longest, causal=True, return_attn_probs=True
        )
        return out, lse

    whole, parts = (_cumulative(each, device) for each in (bounds, image_bounds))

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, lse = attend(q, k, v, whole)
        if len(query_at) == 0:
            return out
        later, later_lse = attend(q[query_at], k[key_at], v[key_at], parts)
        both = merge(out[query_at], lse[:, query_at], later, later_lse)
        return out.index_copy(0, query_at, both.to(out.dtype))

    return call


def _cumulative(bounds: list[int], device: torch.device) -> tuple[Tensor, int]:
    """Made once: from host numbers on every call the copy would wait for the GPU."""
    longest = max((b - a for a, b in itertools.pairwise(bounds)), default=0)
    return torch.tensor(bounds, dtype=torch.int32, device=device), longest


MOST_COMPILED_SIZES = 8  # every further image size is a part of the graph of its own: minutes of compilation


def gram(teacher: Tensor, lengths: tuple[int, ...]) -> dict[str, Builder]:
    """The clipped Gram loss in bf16, images of one size as one batch: what eager PyTorch does at its best."""
    runs = [(length, len(list(run))) for length, run in itertools.groupby(lengths)]

    def plain(student: Tensor) -> Tensor:
        losses = []
        start = 0
        for length, count in runs:
            rows = slice(start, start + length * count)
            student_BNK, teacher_BNK = (
                F.normalize(z[rows].view(count, length, -1), dim=-1) for z in (student, teacher)
            )
            excess_BNN = (student_BNK @ student_BNK.mT - teacher_BNK @ teacher_BNK.mT).clamp(min=0)
            losses.append(excess_BNN.square().sum(dtype=torch.float32) / length**2)
            start = rows.stop
        return torch.stack(losses).sum()

    def build_compiled() -> Callable[..., Tensor]:
        if len(runs) > MOST_COMPILED_SIZES:
            raise LeftOut(f"{len(runs)} image sizes would compile for minutes")
        return compiled(plain)

    return {"eager bf16": lambda: plain, "compiled": build_compiled}


def head(targets: Tensor) -> dict[str, Builder]:
    """Logits of all rows, eager and compiled, fused losses where installed, and the bare matrix products."""

    def plain(hidden: Tensor, weight: Tensor) -> Tensor:
        return F.cross_entropy((hidden @ weight.T).float(), targets, reduction="sum")

    return {
        "eager": lambda: plain,
        "compiled": lambda: compiled(plain),
        # By position: up to torch 2.11 `apply` takes no keywords.
        GEMMS_ALONE: lambda: lambda hidden, weight: _ThreeProducts.apply(hidden, weight),
        "liger": where_installed("liger_kernel", lambda: _liger(targets)),
        "cut cross-entropy": where_installed("cut_cross_entropy", lambda: _cut_cross_entropy(targets)),
    }


def _liger(targets: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss(reduction="sum")
    return lambda hidden, weight: loss(weight, hidden, targets)


def _cut_cross_entropy(targets: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    from cut_cross_entropy import linear_cross_entropy

    return lambda hidden, weight: linear_cross_entropy(hidden, weight, targets, reduction="sum")


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
