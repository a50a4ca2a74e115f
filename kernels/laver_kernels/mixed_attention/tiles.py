"""Pieces shared by the attention kernels: tile bounds, tile loads, the inverse rotation.

Head columns: a head dimension that is no power of two is padded *per half*, so that the pair (f, f + D/2) of
the rotation always stands HALF_PAD columns apart; all kernels use this order, and dot products do not mind.
"""

import triton
import triton.language as tl

HALF_TOKEN = tl.constexpr(2.0**99)
LOWEST = tl.constexpr(-(2.0**80))  # where running maxima start: below all scores, above all hidden ones


@triton.jit
def head_columns(HALF: tl.constexpr, HALF_PAD: tl.constexpr):
    """Offsets of the padded columns within a head, and which of them are real."""
    column = tl.arange(0, 2 * HALF_PAD)
    if HALF == HALF_PAD:
        return column, column >= 0
    within = column % HALF_PAD
    return (column // HALF_PAD) * HALF + within, within < HALF


@triton.jit
def load_tile(
    base, start, stride, offset, row, column_ok, num_rows, CHECK_ROWS: tl.constexpr, PAD: tl.constexpr
):
    """Rows `start + row` of a strided matrix; int64 only for the tile's base, int32 inside the tile."""
    pointer = base + tl.cast(start, tl.int64) * stride + offset
    if CHECK_ROWS:
        if PAD:
            return tl.load(pointer, mask=(start + row < num_rows)[:, None] & column_ok[None, :], other=0.0)
        return tl.load(pointer, mask=(start + row < num_rows)[:, None], other=0.0)
    if PAD:
        return tl.load(pointer, mask=column_ok[None, :], other=0.0)
    return tl.load(pointer)


@triton.jit
def reach_of(lo, hi):
    """Middle and half width of intervals [lo, hi), in units so large that no score comes near the distance of half a
    token; exact below 2^23 tokens."""
    return (lo + hi - 1).to(tl.float32) * HALF_TOKEN, (hi - lo).to(tl.float32) * HALF_TOKEN


@triton.jit
def hide(score, start, offset, middle, reach, CHECK_LOW: tl.constexpr):
    """`score` where `start + offset` lies within `reach` of `middle`, else far below all scores; without CHECK_LOW
    below the upper end is enough.

    A minimum with the distance to the interval's end takes three instructions, two of them on the float lanes, which
    are idle; comparing with both ends and selecting takes four on the others.
    """
    place = (tl.cast(start, tl.float32) + offset.to(tl.float32)) * (2 * HALF_TOKEN)
    bound = reach - tl.abs(place - middle) if CHECK_LOW else middle + reach - place
    return tl.minimum(score, bound, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def phase_bounds(lo, hi, is_real, num_tokens, STEP: tl.constexpr):
    """Where a tile's loop starts, where every member sees the whole step (from, to), and where it ends.

    [start, full_from) needs the mask, [full_from, full_to) does not, [full_to, end) only its upper bounds: it
    lies past the full part, and so past every lower bound. Without a full part all is in the first.
    An empty interval makes the full part empty, and does not widen the range.
    """
    is_live = is_real & (lo < hi)
    first = tl.min(tl.where(is_live, lo, num_tokens), 0)
    end = tl.max(tl.where(is_live, hi, 0), 0)
    full_from = tl.cdiv(tl.max(tl.where(is_real, lo, 0), 0), STEP) * STEP
    full_to = (tl.min(tl.where(is_real, hi, num_tokens), 0) // STEP) * STEP
    start = (first // STEP) * STEP
    has_full = full_from < full_to
    full_from = tl.where(has_full, full_from, end)
    full_to = tl.where(has_full, full_to, end)
    return start, full_from, full_to, end


@triton.jit
def store_unrotated(
    grad, out, cos, sin, row, num_rows, table_row, ROTATE: tl.constexpr,
    ROWS: tl.constexpr, HALF: tl.constexpr, HALF_PAD: tl.constexpr,
):  # fmt: skip
    """Stores `[ROWS, 2 * HALF_PAD]` gradients of a rotated head as gradients of the head before rotation."""
    frequency = tl.arange(0, HALF_PAD)
    ok = (row < num_rows)[:, None] & (frequency < HALF)[None, :]
    first, second = tl.split(tl.permute(tl.reshape(grad, (ROWS, 2, HALF_PAD)), (0, 2, 1)))
    if ROTATE:
        at = table_row[:, None] * HALF + frequency[None, :]
        c = tl.load(cos + at, mask=ok, other=1.0)
        s = tl.load(sin + at, mask=ok, other=0.0)
        first, second = first * c + second * s, second * c - first * s
    dtype = out.dtype.element_ty
    tl.store(out + frequency[None, :], first.to(dtype), mask=ok)
    tl.store(out + HALF + frequency[None, :], second.to(dtype), mask=ok)
