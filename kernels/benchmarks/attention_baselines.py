"""What K1 is timed against: FlexAttention, SDPA, and the flash kernels that are installed.

No baseline pays inside the timing for what a user does once (heads repeated, a mask made a bias, ranges), and none has
its gradients timed before they agree with ours.
"""

import contextlib
import dataclasses
import importlib
import itertools
from collections.abc import Callable
from typing import Any

import baselines
import torch
import torch.nn.functional as F
from torch import Tensor

from laver_kernels import Intervals
from laver_kernels.mixed_attention.rope import rotate
from laver_kernels.testing_masks import Document


def attention(
    intervals: Intervals, documents: tuple[Document, ...], rope: tuple[Tensor, Tensor] | None
) -> tuple[dict[str, baselines.Builder], dict[str, Callable[[], object]]]:
    """FlexAttention, SDPA with a dense mask, flash-attn in two merged calls; and what their masks cost."""
    device = intervals.device
    found: dict[str, baselines.Builder] = {
        "flex": lambda: _flex(intervals),
        "flex flash": lambda: _flex(intervals, kernel_options={"BACKEND": "FLASH"}),
        "sdpa dense mask": lambda: _sdpa(intervals),
        "sdpa cudnn": lambda: _sdpa(intervals, cudnn=True),
        "fa2 decomposed": baselines.where_installed(
            "flash_attn", lambda: _flash_decomposed(documents, device)
        ),
        "fa3 decomposed": baselines.where_installed(
            "flash_attn_interface", lambda: _flash_decomposed(documents, device, "flash_attn_interface")
        ),
        "fa4 decomposed": baselines.where_installed(
            "flash_attn.cute", lambda: _flash_decomposed(documents, device, "flash_attn.cute")
        ),
        "magi ffa": baselines.where_installed("magi_attention", lambda: _magi(documents, device)),
        "te": baselines.where_installed("transformer_engine", _transformer_engine),
    }
    if rope is not None:
        found = {name: _after_rotation(build, rope) for name, build in found.items()}
    return found, {"flex mask": block_mask_builder(intervals)}


def _after_rotation(build: baselines.Builder, rope: tuple[Tensor, Tensor]) -> baselines.Builder:
    def build_rotated() -> Callable[..., Tensor]:
        function = build()
        rotated = baselines.compiled(lambda q, k: (rotate(q, *rope), rotate(k, *rope)))
        if isinstance(function, baselines.Prepared):
            inner = function.function
            return dataclasses.replace(function, function=lambda q, k, v: inner(*rotated(q, k), v))
        return lambda q, k, v: function(*rotated(q, k), v)

    return build_rotated


def block_mask_builder(intervals: Intervals) -> Callable[[], Any]:
    """FlexAttention's block mask of the intervals, by a compiled call: uncompiled it holds the [T, T] mask."""
    from torch.nn.attention.flex_attention import create_block_mask

    low, high = intervals.row_lo_T, intervals.row_hi_T
    num_tokens, device = len(intervals), str(intervals.device)

    def sees(batch, head, row, key):
        return (key >= low[row]) & (key < high[row])

    create = baselines.compiled(create_block_mask)
    return lambda: create(sees, None, None, num_tokens, num_tokens, device)


def _flex(intervals: Intervals, **options: Any) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    mask = block_mask_builder(intervals)()
    function = baselines.compiled(flex_attention)

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        return function(q, k, v, block_mask=mask, enable_gqa=True, **options)[0].transpose(0, 1)

    return call


def dense_mask_bytes(num_tokens: int) -> int:
    """The mask as bool, and as the bias in 16 bits that SDPA makes of it, forward and backward."""
    return 5 * num_tokens**2


def _sdpa(intervals: Intervals, cudnn: bool = False) -> baselines.Prepared:
    """Heads repeated and the mask made a bias before the timing; `cudnn` asks for that backend alone."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    if cudnn and intervals.device.type != "cuda":
        raise baselines.LeftOut("cuDNN needs a GPU")
    if intervals.device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(intervals.device)
        wanted = dense_mask_bytes(len(intervals))
        if wanted > free // 2:
            raise baselines.LeftOut(
                f"a [T, T] mask and bias take {wanted / 1e9:.0f} GB of {free / 1e9:.0f} GB free"
            )
    place = torch.arange(len(intervals), device=intervals.device)
    mask = (place >= intervals.row_lo_T[:, None]) & (place < intervals.row_hi_T[:, None])
    biases: dict[torch.dtype, Tensor] = {}

    def prepare(q: Tensor, k: Tensor, v: Tensor) -> dict[str, Tensor]:
        # Repeated by hand: with enable_gqa and a mask SDPA has only its unfused path.
        group = q.shape[1] // k.shape[1]
        if q.dtype not in biases:
            biases[q.dtype] = torch.zeros(mask.shape, dtype=q.dtype, device=q.device).masked_fill_(
                ~mask, -float("inf")
            )
        k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
        return {"q": q, "k": k, "v": v}

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        bias = biases[q.dtype]
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        backends = contextlib.nullcontext() if not cudnn else sdpa_kernel(SDPBackend.CUDNN_ATTENTION)
        with backends:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)[0].transpose(0, 1)

    return baselines.Prepared(prepare=prepare, function=call)


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


def _magi(documents: tuple[Document, ...], device: torch.device) -> Callable[..., Tensor]:
    """Every text and image segment as one pair of ranges: its document up to its end, causal or full."""
    from magi_attention.api import flex_flash_attn_func

    queries, keys, kinds = segment_ranges(documents)
    as_tensor = [torch.tensor(each, dtype=torch.int32, device=device) for each in (queries, keys, kinds)]
    return lambda q, k, v: flex_flash_attn_func(q, k, v, *as_tensor[:2], attn_type_map=as_tensor[2])[0]


def segment_ranges(documents: tuple[Document, ...]) -> tuple[list, list, list]:
    """Query range, key range and kind (0 full, 1 causal from the lower right) of every segment."""
    queries, keys, kinds = [], [], []
    place = 0
    for document in documents:
        start = place
        for kind, length in document:
            queries.append((place, place + length))
            keys.append((start, place + length))
            kinds.append(0 if kind == "image" else 1)
            place += length
    return queries, keys, kinds


def _transformer_engine() -> Callable[..., Tensor]:
    raise baselines.LeftOut("no fused kernel of Transformer Engine takes this mask")


def _flash_decomposed(documents: tuple[Document, ...], device: torch.device, module: str = "flash_attn"):
    """flash-attn has no such mask: causal over documents, later keys of the same image merged in by LSE.

    `module` is that of FlashAttention 2, 3 (Hopper) or 4 (CuTe). None sends a gradient through its LSE, so that the
    comparison of gradients leaves the backward out.
    """
    varlen = importlib.import_module(module).flash_attn_varlen_func
    wants_lse = {"return_lse" if module == "flash_attn.cute" else "return_attn_probs": True}
    joined = baselines.compiled(merge)

    bounds = [0]
    for document in documents:
        bounds.append(bounds[-1] + sum(length for _, length in document))
    query_at, key_at, image_bounds = later_image_keys(documents)
    query_at, key_at = query_at.to(device), key_at.to(device)

    def attend(q, k, v, lengths):
        cumulative, longest = lengths
        sizes = {"cu_seqlens_q": cumulative, "cu_seqlens_k": cumulative}
        sizes |= {"max_seqlen_q": longest, "max_seqlen_k": longest}
        out, lse, *_ = varlen(q, k, v, **sizes, causal=True, **wants_lse)
        return out, lse

    whole, parts = (_cumulative(each, device) for each in (bounds, image_bounds))

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, lse = attend(q, k, v, whole)
        if len(query_at) == 0:
            return out
        later, later_lse = attend(q[query_at], k[key_at], v[key_at], parts)
        both = joined(out[query_at], lse[:, query_at], later, later_lse)
        return out.index_copy(0, query_at, both.to(out.dtype))

    return call


def _cumulative(bounds: list[int], device: torch.device) -> tuple[Tensor, int]:
    """Made once: from host numbers on every call the copy would wait for the GPU."""
    longest = max((b - a for a, b in itertools.pairwise(bounds)), default=0)
    return torch.tensor(bounds, dtype=torch.int32, device=device), longest
