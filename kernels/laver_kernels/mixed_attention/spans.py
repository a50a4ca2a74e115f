"""Intervals from what a caller has: spans of documents and images, or the cumulative lengths of packed attention.

Everything is computed on the device of the spans, without waiting for it.
"""

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from laver_kernels.checks import can_read, want_tensor

Spans = Sequence[tuple[int, int]] | Tensor
"""`[n, 2]` of (first token, one past the last), in order and apart from one another."""


def bounds_of_spans(documents_N2: Tensor, images_M2: Tensor, num_tokens: int) -> tuple[Tensor, ...]:
    """row_lo, row_hi, col_lo, col_hi, int32 `[T]`: causal in a document, both ways in an image, else empty."""
    place_T = torch.arange(num_tokens, device=documents_N2.device)
    document_lo_T, document_hi_T, in_document_T = _span_of(place_T, documents_N2)
    image_lo_T, image_hi_T, in_image_T = _span_of(place_T, images_M2)
    row_hi_T = torch.where(in_image_T, image_hi_T, place_T + 1)
    col_lo_T = torch.where(in_image_T, image_lo_T, place_T)
    bounds = (document_lo_T, row_hi_T, col_lo_T, document_hi_T)
    return tuple(torch.where(in_document_T, bound, 0).int() for bound in bounds)


def _span_of(place_T: Tensor, spans_N2: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Start and end of the span that a place lies in, and whether it lies in one."""
    if len(spans_N2) == 0:
        return place_T, place_T, torch.zeros_like(place_T, dtype=torch.bool)
    start_N, end_N = spans_N2[:, 0].contiguous(), spans_N2[:, 1]
    # Of spans that start together only the last can hold anything: the ones before it are empty.
    at_T = torch.searchsorted(start_N, place_T, right=True) - 1
    inside_T = (at_T >= 0) & (place_T < end_N[at_T])
    return start_N[at_T], end_N[at_T], inside_T


def as_spans(name: str, spans: Spans, device: torch.device | str | None) -> Tensor:
    """int64 `[n, 2]` on a device; a list goes to the CPU where none is named.

    Raises:
        ValueError: no pairs of whole numbers, or pairs out of order.
    """
    if not isinstance(spans, Tensor):
        if any(len(span) != 2 for span in spans):
            raise ValueError(f"Intervals: {name} holds {next(s for s in spans if len(s) != 2)}, want pairs")
        spans = torch.tensor([tuple(span) for span in spans], dtype=torch.int64).reshape(-1, 2)
    want_tensor("Intervals", name, spans, (len(spans), 2), (torch.int32, torch.int64))
    if can_read(spans):
        _check_order(name, spans.tolist())
    return spans.to(device=spans.device if device is None else device, dtype=torch.int64, non_blocking=True)


def _check_order(name: str, spans: list[list[int]]) -> None:
    for start, end in spans:
        if not 0 <= start <= end:
            raise ValueError(f"Intervals: {name} holds ({start}, {end}), want 0 <= start <= end")
    for (_, end), (start, following) in itertools.pairwise(spans):
        if start < end:
            raise ValueError(f"Intervals: {name} ({start}, {following}) begins before the last ends at {end}")


def check_within(documents_N2: Tensor, images_M2: Tensor, num_tokens: int) -> None:
    """Documents end within the sequence, and every image lies in one of them; only where looking is free."""
    if not (can_read(documents_N2) and can_read(images_M2)):
        return
    documents = documents_N2.tolist()
    if documents and documents[-1][1] > num_tokens:
        raise ValueError(
            f"Intervals: documents end at {documents[-1][1]}, want within num_tokens={num_tokens}"
        )
    for start, end in images_M2.tolist():
        if start < end and not any(first <= start and end <= last for first, last in documents):
            raise ValueError(f"Intervals: image ({start}, {end}) lies in no document, want it inside one")
