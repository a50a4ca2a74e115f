"""Forward kernel of mixed attention: one tile of query rows of one head per program, online softmax.

Flash attention's recurrence (arXiv 2205.14135) over the interval of keys that the tile sees, in base 2.
Running maxima start at a large finite number: a row that has seen nothing yet must not give inf - inf.
"""

import triton
import triton.language as tl

from laver_kernels.mixed_attention.tiles import LOWEST, head_columns, hide, load_tile, phase_bounds, reach_of


@triton.jit
def fold(acc, row_sum, row_max, score, v, scale_log2, PRECISION: tl.constexpr):
    """One step of the running softmax: hidden scores lie below LOWEST and come to nothing."""
    new_max = tl.maximum(row_max, tl.max(score, 1) * scale_log2)
    p = tl.exp2(score * scale_log2 - new_max[:, None])
    decay = tl.exp2(row_max - new_max)
    row_sum = row_sum * decay + tl.sum(p, 1)
    acc = tl.dot(p.to(v.dtype), v, acc * decay[:, None], input_precision=PRECISION)
    return acc, row_sum, new_max


@triton.jit
def finish(
    acc, row_sum, row_max, out, lse, row_start, row, is_real, column, column_ok, stride_ot, ROWS: tl.constexpr
):
    """Divides by the sums and stores a tile of the output and of the log-sum-exps in base 2."""
    has_keys = row_sum > 0
    divisor = tl.where(has_keys, row_sum, 1.0)
    out += tl.cast(row_start, tl.int64) * stride_ot
    offset = tl.arange(0, ROWS)[:, None] * stride_ot + column[None, :]
    ok = is_real[:, None] & column_ok[None, :]
    tl.store(out + offset, (acc / divisor[:, None]).to(out.dtype.element_ty), mask=ok)
    tl.store(lse + row, tl.where(has_keys, row_max + tl.log2(divisor), float("inf")), mask=is_real)


@triton.jit
def _attend_keys(
    acc, row_sum, row_max, q, middle, reach, K, V, stride_kt, stride_vt, scale_log2, num_tokens, start, end,
    COLUMNS: tl.constexpr, HALF: tl.constexpr, HALF_PAD: tl.constexpr,
    MASK: tl.constexpr, CHECK_LOW: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Folds the keys [start, end) into the running softmax; MASK where a row may not see a key."""
    key = tl.arange(0, COLUMNS)
    column, column_ok = head_columns(HALF, HALF_PAD)
    PAD: tl.constexpr = HALF != HALF_PAD
    k_offset = key[:, None] * stride_kt + column[None, :]
    v_offset = key[:, None] * stride_vt + column[None, :]
    for key_start in range(start, end, COLUMNS):
        key_start = tl.multiple_of(key_start, COLUMNS)
        k = load_tile(K, key_start, stride_kt, k_offset, key, column_ok, num_tokens, MASK, PAD)
        score = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        if MASK:
            score = hide(score, key_start, key[None, :], middle[:, None], reach[:, None], CHECK_LOW)
        v = load_tile(V, key_start, stride_vt, v_offset, key, column_ok, num_tokens, MASK, PAD)
        acc, row_sum, row_max = fold(acc, row_sum, row_max, score, v, scale_log2, PRECISION)
    return acc, row_sum, row_max


@triton.jit(do_not_specialize=["num_keys"])
def attention_forward(
    Q, K, V, OUT, LSE, ROW_LO, ROW_HI, scale_log2, num_tokens, num_keys,
    stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, stride_ot,
    GROUP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    HALF: tl.constexpr, HALF_PAD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """OUT `[T, H, D]` and LSE `[H, T]` (base 2; +inf where a row sees nothing) from rotated Q and K."""
    # In a long document the last rows see most: they go first.
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    head = tl.program_id(1)
    group = head // GROUP
    row_start = tile * ROWS
    row_in_tile = tl.arange(0, ROWS)
    row = row_start + row_in_tile
    is_real = row < num_tokens
    lo = tl.load(ROW_LO + row, mask=is_real, other=0)
    hi = tl.load(ROW_HI + row, mask=is_real, other=0)
    start, full_from, full_to, end = phase_bounds(lo, hi, is_real, num_keys, COLUMNS)

    column, column_ok = head_columns(HALF, HALF_PAD)
    PAD: tl.constexpr = HALF != HALF_PAD
    q_offset = row_in_tile[:, None] * stride_qt + column[None, :]
    Q += tl.cast(head, tl.int64) * stride_qh
    q = load_tile(Q, row_start, stride_qt, q_offset, row_in_tile, column_ok, num_tokens, True, PAD)
    K += tl.cast(group, tl.int64) * stride_kh
    V += tl.cast(group, tl.int64) * stride_vh
    acc = tl.zeros((ROWS, 2 * HALF_PAD), tl.float32)
    row_sum = tl.zeros((ROWS,), tl.float32)
    row_max = tl.full((ROWS,), LOWEST, tl.float32)
    middle, reach = reach_of(lo, hi)
    acc, row_sum, row_max = _attend_keys(
        acc, row_sum, row_max, q, middle, reach, K, V, stride_kt, stride_vt, scale_log2, num_keys,
        start, full_from, COLUMNS, HALF, HALF_PAD, True, True, PRECISION,
    )  # fmt: skip
    acc, row_sum, row_max = _attend_keys(
        acc, row_sum, row_max, q, middle, reach, K, V, stride_kt, stride_vt, scale_log2, num_keys,
        full_from, full_to, COLUMNS, HALF, HALF_PAD, False, False, PRECISION,
    )  # fmt: skip
    acc, row_sum, row_max = _attend_keys(
        acc, row_sum, row_max, q, middle, reach, K, V, stride_kt, stride_vt, scale_log2, num_keys,
        full_to, end, COLUMNS, HALF, HALF_PAD, True, False, PRECISION,
    )  # fmt: skip

    finish(
        acc, row_sum, row_max, OUT + head * (2 * HALF), LSE + tl.cast(head, tl.int64) * num_tokens, row_start, row,
        is_real, column, column_ok, stride_ot, ROWS,
    )  # fmt: skip
