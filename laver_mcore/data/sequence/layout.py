"""Where every token of a packed sequence stands and what it sees: 2D positions and mixed-attention intervals.

A document is a list of segments, `("text", n)` or `("image", h, w)`. `allow(i, j) = same document and
(j <= i or i and j in the same image)` (LaVer, arXiv 2512.06281, section 3.3), so each row sees one interval of
columns and each column is seen by one interval of rows. Shapes: S = tokens of the packed sequence, padding included.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from laver_kernels import Intervals
from laver_mcore.data.sequence.prompt import Segment


@dataclass(frozen=True)
class SequenceLayout:
    """`positions_3S` int64 holds (temporal, row, column) for the rotation; `intervals` is the mask, `[S]`."""

    positions_3S: Tensor
    intervals: Intervals

    def __len__(self) -> int:
        return self.positions_3S.shape[1]


def dialogue_layout(documents: Sequence[Sequence[Segment]]) -> SequenceLayout:
    """Lay documents side by side, without padding.

    With p = the document's previous maximum position + 1, text stands at (p, p, p) and patch (r, c) of an
    image at (p, p + r, p + c); an image advances p by max(h, w) (as Qwen2-VL does).
    """
    segments = [(index, segment) for index, document in enumerate(documents) for segment in document]
    # G = segments of all documents together.
    document_G = np.array([index for index, _ in segments], dtype=np.int64)
    is_image_G = np.array([segment[0] == "image" for _, segment in segments], dtype=bool)
    shape_G2 = np.array([_shape(segment) for _, segment in segments], dtype=np.int64).reshape(-1, 2)
    length_G = shape_G2.prod(axis=1)
    stop_G = length_G.cumsum()
    start_G = stop_G - length_G

    length_D = np.bincount(document_G, weights=length_G, minlength=len(documents)).astype(np.int64)
    document_stop_D = length_D.cumsum()
    document_start_D = document_stop_D - length_D

    # Position where each segment begins: what the segments before it in its document advanced by.
    advance_G = np.where(is_image_G, shape_G2.max(axis=1, initial=0), length_G)
    before_G = advance_G.cumsum() - advance_G
    first_G = np.searchsorted(document_G, document_G, side="left")
    base_G = before_G - before_G[first_G] if len(segments) else before_G

    # From segments to tokens.
    segment_S = np.repeat(np.arange(len(segments)), length_G)
    token_S = np.arange(len(segment_S))
    offset_S = token_S - start_G[segment_S]
    is_image_S = is_image_G[segment_S]
    base_S = base_G[segment_S]
    width_S = np.where(is_image_S, shape_G2[segment_S, 1], 1)
    positions_3S = np.stack(
        [
            base_S + np.where(is_image_S, 0, offset_S),
            base_S + offset_S // width_S,
            base_S + np.where(is_image_S, offset_S % width_S, offset_S),
        ]
    )
    intervals = _intervals(
        row_lo=document_start_D[document_G][segment_S],
        row_hi=np.where(is_image_S, stop_G[segment_S], token_S + 1),
        col_lo=np.where(is_image_S, start_G[segment_S], token_S),
        col_hi=document_stop_D[document_G][segment_S],
        blocks=(0, *document_stop_D[length_D > 0].tolist()),
    )
    return SequenceLayout(torch.from_numpy(positions_3S), intervals)


def reconstruction_layout(grids: Sequence[tuple[int, int]]) -> SequenceLayout:
    """Lay images side by side, each a document of its own: bidirectional, patch (r, c) at (0, r, c)."""
    return dialogue_layout([[("image", height, width)] for height, width in grids])


def concatenate(layouts: Sequence[SequenceLayout], total_length: int | None = None) -> SequenceLayout:
    """Lay sequences side by side and pad the tail to `total_length` with empty intervals and position 0."""
    lengths = [len(layout) for layout in layouts]
    padding = 0 if total_length is None else total_length - sum(lengths)
    if padding < 0:
        raise ValueError(f"layouts of {sum(lengths)} tokens do not fit into total_length={total_length}")
    if len(layouts) == 1 and not padding:
        return layouts[0]
    positions = [layout.positions_3S for layout in layouts]
    device = positions[0].device if positions else torch.device("cpu")
    columns: list[list[Tensor]] = [[], [], [], []]
    blocks: list[int] | None = [0]
    start = 0
    for layout, length in zip(layouts, lengths, strict=True):
        it = layout.intervals
        for column, part in zip(columns, (it.row_lo_T, it.row_hi_T, it.col_lo_T, it.col_hi_T), strict=True):
            column.append(part + start)  # an empty interval stays empty
        blocks = (
            None if blocks is None or it.blocks is None else [*blocks, *(b + start for b in it.blocks[1:])]
        )
        start += length
    if blocks is not None and padding:
        blocks.append(start + padding)
    empty = torch.zeros(padding, dtype=torch.int32, device=device)
    row_lo, row_hi, col_lo, col_hi = (torch.cat([*column, empty]) for column in columns)
    intervals = Intervals(
        row_lo_T=row_lo,
        row_hi_T=row_hi,
        col_lo_T=col_lo,
        col_hi_T=col_hi,
        blocks=None if blocks is None else tuple(blocks),
    )
    tail = torch.zeros(3, padding, dtype=torch.int64, device=device)
    return SequenceLayout(torch.cat([*positions, tail], dim=1), intervals)


def trim(layout: SequenceLayout, length: int) -> SequenceLayout:
    """The first `length` tokens; what follows must be padding."""
    if length == len(layout):
        return layout
    it = layout.intervals
    blocks = it.blocks
    if blocks is not None:
        blocks = (*(bound for bound in blocks if bound < length), length)
    intervals = Intervals(
        row_lo_T=it.row_lo_T[:length],
        row_hi_T=it.row_hi_T[:length],
        col_lo_T=it.col_lo_T[:length],
        col_hi_T=it.col_hi_T[:length],
        blocks=blocks,
    )
    return SequenceLayout(layout.positions_3S[:, :length], intervals)


def _shape(segment: Segment) -> tuple[int, int]:
    return (segment[1], 1) if segment[0] == "text" else (segment[1], segment[2])


def _intervals(*, blocks: tuple[int, ...], **bounds: np.ndarray) -> Intervals:
    tensors = {f"{name}_T": torch.from_numpy(bound.astype(np.int32)) for name, bound in bounds.items()}
    return Intervals(**tensors, blocks=blocks)
