"""The interval mask: rows and columns describe the same mask, and a contradiction is refused."""

import pytest
import torch

from laver_kernels import Intervals, mixed_attention
from laver_kernels.mixed_attention.blocked import find_blocks, plan_of
from laver_kernels.testing_masks import MASKS, dense_mask, intervals_of, many_image_documents


def _as_dense(intervals):
    place = torch.arange(len(intervals))
    rows = (place >= intervals.row_lo_T[:, None]) & (place < intervals.row_hi_T[:, None])
    columns = (place[:, None] >= intervals.col_lo_T) & (place[:, None] < intervals.col_hi_T)
    return rows, columns


@pytest.mark.parametrize("name", MASKS)
def test_rows_and_columns_are_the_defined_mask(name):
    documents, padding = MASKS[name]
    want = dense_mask(documents, padding)
    intervals = intervals_of(documents, padding)
    intervals.validate()
    derived = Intervals.from_rows(intervals.row_lo_T, intervals.row_hi_T)
    derived.validate()
    for mask in (*_as_dense(intervals), *_as_dense(derived)):
        assert torch.equal(mask, want)


def test_blocks_are_found_and_grouped():
    documents, _ = MASKS["documents of every size"]
    intervals = intervals_of(documents)
    assert find_blocks(intervals) == intervals.blocks
    groups = plan_of(intervals).groups
    assert [(group.num_blocks, group.length) for group in groups] == [(2, 80), (1, 16), (1, 1)]


def test_empty_rows_between_live_ones_count_as_the_same_mask():
    row_lo = torch.tensor([0, 0, 0, 0], dtype=torch.int32)
    row_hi = torch.tensor([1, 0, 3, 4], dtype=torch.int32)
    Intervals.from_rows(row_lo, row_hi).validate()


def test_mask_memory_is_linear():
    intervals = intervals_of(many_image_documents(8192))
    num_bytes = sum(
        x.nbytes for x in (intervals.row_lo_T, intervals.row_hi_T, intervals.col_lo_T, intervals.col_hi_T)
    )
    assert num_bytes == 128 * 1024


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"row_lo_T": torch.tensor([0, 0, 2, 1], dtype=torch.int32)},
            "row_lo_T falls from 2 at row 2 to 1 at row 3",
        ),
        ({"row_hi_T": torch.tensor([1, 3, 2, 4], dtype=torch.int32)}, "row_hi_T falls from 3 at row 1"),
        (
            {"row_hi_T": torch.tensor([1, 2, 3, 5], dtype=torch.int32)},
            r"rows reach .0, 5., want within \[0, 4\)",
        ),
        ({"col_hi_T": torch.tensor([4, 4, 4, 3], dtype=torch.int32)}, "column 3 says"),
        ({"col_lo_T": torch.tensor([0, 0, 2, 3], dtype=torch.int32)}, "column 1 says"),
        ({"blocks": (0, 2, 4)}, "row 2 sees .0, 3., outside its block .2, 4."),
    ],
)
def test_contradictions_are_refused(change, words):
    place = torch.arange(4, dtype=torch.int32)
    good = {
        "row_lo_T": torch.zeros(4, dtype=torch.int32),
        "row_hi_T": place + 1,
        "col_lo_T": place,
        "col_hi_T": torch.full((4,), 4, dtype=torch.int32),
    }
    x = torch.zeros(4, 1, 16)
    mixed_attention(x, x, x, Intervals(**good), impl="reference")
    with pytest.raises(ValueError, match=words):
        mixed_attention(x, x, x, Intervals(**(good | change)), impl="reference")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"row_lo_T": torch.zeros(4, dtype=torch.int64)}, "row_lo_T is torch.int64, want torch.int32"),
        ({"col_hi_T": torch.zeros(3, dtype=torch.int32)}, r"col_hi_T has shape \[3\], want \[4\]"),
        ({"blocks": (0, 3)}, r"blocks=\(0, 3\), want increasing boundaries from 0 to T=4"),
        ({"blocks": (0, 2, 2, 4)}, "want increasing boundaries"),
    ],
)
def test_bad_tensors_are_refused_at_construction(change, words):
    good = dict.fromkeys(("row_lo_T", "row_hi_T", "col_lo_T", "col_hi_T"), torch.zeros(4, dtype=torch.int32))
    with pytest.raises(ValueError, match=words):
        Intervals(**(good | change))


def test_moving_keeps_the_mask():
    intervals = intervals_of(MASKS["padding tail"][0], 3)
    assert intervals.to("cpu") is intervals
    assert intervals.to("meta").blocks == intervals.blocks
    assert len(intervals.to("meta")) == len(intervals)


def _spans(documents):
    """Spans of documents and of images, by counting."""
    document_spans, image_spans, place = [], [], 0
    for document in documents:
        start = place
        for kind, length in document:
            if kind == "image":
                image_spans.append((place, place + length))
            place += length
        document_spans.append((start, place))
    return document_spans, image_spans


@pytest.mark.parametrize("name", MASKS)
def test_spans_and_cumulative_lengths_are_the_defined_mask(name):
    documents, padding = MASKS[name]
    want = dense_mask(documents, padding)
    document_spans, image_spans = _spans(documents)
    cu_seqlens = torch.tensor([0, *(end for _, end in document_spans)], dtype=torch.int32)
    for intervals in (
        Intervals.from_spans(document_spans, image_spans, len(want)),
        Intervals.from_spans(
            torch.tensor(document_spans, dtype=torch.int64).reshape(-1, 2), image_spans, len(want)
        ),
        Intervals.from_cu_seqlens(cu_seqlens, image_spans, len(want)),
    ):
        intervals.validate()
        for mask in _as_dense(intervals):
            assert torch.equal(mask, want)


def test_spans_may_be_empty_apart_and_end_the_sequence():
    assert len(Intervals.from_spans([(0, 3), (3, 3), (3, 7)])) == 7
    apart, _ = _as_dense(Intervals.from_spans([(1, 3), (5, 6)], num_tokens=8))
    assert apart.sum(1).tolist() == [0, 1, 2, 0, 0, 1, 0, 0]


@pytest.mark.parametrize(
    ("documents", "images", "num_tokens", "words"),
    [
        ([(0, 3), (2, 5)], (), None, r"documents \(2, 5\) begins before the last ends at 3"),
        ([(3, 1)], (), None, r"documents holds \(3, 1\), want 0 <= start <= end"),
        ([(0, 3, 4)], (), None, r"documents holds \(0, 3, 4\), want pairs"),
        ([(0, 9)], (), 8, "documents end at 9, want within num_tokens=8"),
        ([(0, 4), (4, 8)], [(3, 5)], None, r"image \(3, 5\) lies in no document"),
        (torch.tensor([0, 3]), (), None, r"documents has shape \[2\], want \[2, 2\]"),
    ],
)
def test_bad_spans_are_refused(documents, images, num_tokens, words):
    with pytest.raises(ValueError, match=words):
        Intervals.from_spans(documents, images, num_tokens)


def test_cumulative_lengths_start_at_zero():
    with pytest.raises(ValueError, match=r"cu_seqlens=\[1, 4\], want it to start with 0"):
        Intervals.from_cu_seqlens(torch.tensor([1, 4]))
