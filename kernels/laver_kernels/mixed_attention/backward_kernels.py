"""Backward kernels of mixed attention: dq by query tiles, dk and dv by key tiles; no atomics.

With P the probabilities recomputed from LSE, delta_i = <out_i, dout_i>, dS = P * (dout V^T - delta):
dq = scale dS K, dk = scale dS^T q, dv = P^T dout.
"""

import triton
import triton.language as tl

from laver_kernels.mixed_attention.tiles import (
    head_columns,
    hide,
    load_tile,
    phase_bounds,
    reach_of,
    store_unrotated,
)


@triton.jit
def _dq_over_keys(
    dq, q, dout, lse, delta, middle, reach, K, V, stride_kt, stride_vt, scale_log2, num_tokens, start, end,
    COLUMNS: tl.constexpr, HALF: tl.constexpr, HALF_PAD: tl.constexpr,
    MASK: tl.constexpr, CHECK_LOW: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    key = tl.arange(0, COLUMNS)
    column, column_ok = head_columns(HALF, HALF_PAD)
    PAD: tl.constexpr = HALF != HALF_PAD
    k_offset = key[:, None] * stride_kt + column[None, :]
    v_offset = key[:, None] * stride_vt + column[None, :]
    for key_start in range(start, end, COLUMNS):
        key_start = tl.multiple_of(key_start, COLUMNS)
        k = load_tile(K, key_start, stride_kt, k_offset, key, column_ok, num_tokens, MASK, PAD)
        v = load_tile(V, key_start, stride_vt, v_offset, key, column_ok, num_tokens, MASK, PAD)
        score = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale_log2 - lse[:, None]
        if MASK:
            score = hide(score, key_start, key[None, :], middle[:, None], reach[:, None], CHECK_LOW)
        p = tl.exp2(score)
        dp = tl.dot(dout, tl.trans(v), input_precision=PRECISION)
        ds = (p * (dp - delta[:, None])).to(k.dtype)
        dq = tl.dot(ds, k, dq, input_precision=PRECISION)
    return dq


@triton.jit(do_not_specialize=["num_keys"])
def attention_backward_dq(
    Q, K, V, OUT, DOUT, LSE, DLSE, DELTA, DQ, COS, SIN, ROW_LO, ROW_HI, softmax_scale, scale_log2,
    num_tokens, num_keys,
    stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, stride_ot,
    GROUP: tl.constexpr, ROTATE: tl.constexpr, HAS_DLSE: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, HALF: tl.constexpr, HALF_PAD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """DQ `[T, H, D]` before rotation, and DELTA `[H, T]`, which the dk and dv kernel reads after this one."""
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
    middle, reach = reach_of(lo, hi)

    column, column_ok = head_columns(HALF, HALF_PAD)
    PAD: tl.constexpr = HALF != HALF_PAD
    q_offset = row_in_tile[:, None] * stride_qt + column[None, :]
    out_offset = row_in_tile[:, None] * stride_ot + column[None, :]
    Q += tl.cast(head, tl.int64) * stride_qh
    head_out = head * (2 * HALF)
    q = load_tile(Q, row_start, stride_qt, q_offset, row_in_tile, column_ok, num_tokens, True, PAD)
    out = load_tile(
        OUT + head_out, row_start, stride_ot, out_offset, row_in_tile, column_ok, num_tokens, True, PAD
    )
    dout = load_tile(
        DOUT + head_out, row_start, stride_ot, out_offset, row_in_tile, column_ok, num_tokens, True, PAD
    )
    statistic = tl.cast(head, tl.int64) * num_tokens + row
    lse = tl.load(LSE + statistic, mask=is_real, other=float("inf"))
    delta = tl.sum(out.to(tl.float32) * dout.to(tl.float32), 1)
    if HAS_DLSE:  # d lse / d score is P: what flows into lse joins the sum that P multiplies
        delta -= tl.load(DLSE + statistic, mask=is_real, other=0.0)
    tl.store(DELTA + statistic, delta, mask=is_real)

    K += tl.cast(group, tl.int64) * stride_kh
    V += tl.cast(group, tl.int64) * stride_vh
    dq = tl.zeros((ROWS, 2 * HALF_PAD), tl.float32)
    dq = _dq_over_keys(
        dq, q, dout, lse, delta, middle, reach, K, V, stride_kt, stride_vt, scale_log2, num_keys,
        start, full_from, COLUMNS, HALF, HALF_PAD, True, True, PRECISION,
    )  # fmt: skip
    dq = _dq_over_keys(
        dq, q, dout, lse, delta, middle, reach, K, V, stride_kt, stride_vt, scale_log2, num_keys,
        full_from, full_to, COLUMNS, HALF, HALF_PAD, False, False, PRECISION,
    )  # fmt: skip
    dq = _dq_over_keys(
        dq, q, dout, lse, delta, middle, reach, K, V, stride_kt, stride_vt, scale_log2, num_keys,
        full_to, end, COLUMNS, HALF, HALF_PAD, True, False, PRECISION,
    )  # fmt: skip
    row64 = row.to(tl.int64)
    target = DQ + row64[:, None] * stride_ot + head_out
    store_unrotated(
        dq * softmax_scale, target, COS, SIN, row, num_tokens, row64, ROTATE, ROWS, HALF, HALF_PAD
    )


@triton.jit
def _dkdv_over_queries(
    dk, dv, k, v, middle, reach, Q, DOUT, LSE, DELTA, stride_qt, stride_ot, scale_log2, num_tokens, start, end,
    ROWS: tl.constexpr, HALF: tl.constexpr, HALF_PAD: tl.constexpr,
    MASK: tl.constexpr, CHECK_LOW: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    row_in_tile = tl.arange(0, ROWS)
    column, column_ok = head_columns(HALF, HALF_PAD)
    PAD: tl.constexpr = HALF != HALF_PAD
    q_offset = row_in_tile[:, None] * stride_qt + column[None, :]
    out_offset = row_in_tile[:, None] * stride_ot + column[None, :]
    for row_start in range(start, end, ROWS):
        row_start = tl.multiple_of(row_start, ROWS)
        row = row_start + row_in_tile
        q = load_tile(Q, row_start, stride_qt, q_offset, row_in_tile, column_ok, num_tokens, MASK, PAD)
        dout = load_tile(
            DOUT, row_start, stride_ot, out_offset, row_in_tile, column_ok, num_tokens, MASK, PAD
        )
        if MASK:
            lse = tl.load(LSE + row, mask=row < num_tokens, other=float("inf"))
            delta = tl.load(DELTA + row, mask=row < num_tokens, other=0.0)
        else:
            lse = tl.load(LSE + row)
            delta = tl.load(DELTA + row)
        # Transposed: keys down, queries across, so that both products below need no transposed operand.
        score = tl.dot(k, tl.trans(q), input_precision=PRECISION) * scale_log2 - lse[None, :]
        if MASK:
            score = hide(score, row_start, row_in_tile[None, :], middle[:, None], reach[:, None], CHECK_LOW)
        p = tl.exp2(score)
        dv = tl.dot(p.to(dout.dtype), dout, dv, input_precision=PRECISION)
        dp = tl.dot(v, tl.trans(dout), input_precision=PRECISION)
        ds = (p * (dp - delta[None, :])).to(q.dtype)
        dk = tl.dot(ds, q, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit(do_not_specialize=["num_keys"])
def attention_backward_dkdv(
    Q, K, V, DOUT, LSE, DELTA, DK_PART, DV_PART, COL_LO, COL_HI, scale_log2, num_tokens, num_keys,
    stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, stride_ot,
    GROUP: tl.constexpr, HEADS_EACH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    HALF: tl.constexpr, HALF_PAD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Partial dk and dv, fp32 `[splits, T, G, D]`, of one key tile over HEADS_EACH query heads."""
    key_start = tl.program_id(0) * COLUMNS
    group = tl.program_id(1)
    split = tl.program_id(2)
    key_in_tile = tl.arange(0, COLUMNS)
    key = key_start + key_in_tile
    is_real = key < num_keys
    lo = tl.load(COL_LO + key, mask=is_real, other=0)
    hi = tl.load(COL_HI + key, mask=is_real, other=0)
    start, full_from, full_to, end = phase_bounds(lo, hi, is_real, num_tokens, ROWS)
    middle, reach = reach_of(lo, hi)

    column, column_ok = head_columns(HALF, HALF_PAD)
    PAD: tl.constexpr = HALF != HALF_PAD
    k_offset = key_in_tile[:, None] * stride_kt + column[None, :]
    v_offset = key_in_tile[:, None] * stride_vt + column[None, :]
    K += tl.cast(group, tl.int64) * stride_kh
    V += tl.cast(group, tl.int64) * stride_vh
    k = load_tile(K, key_start, stride_kt, k_offset, key_in_tile, column_ok, num_keys, True, PAD)
    v = load_tile(V, key_start, stride_vt, v_offset, key_in_tile, column_ok, num_keys, True, PAD)
    dk = tl.zeros((COLUMNS, 2 * HALF_PAD), tl.float32)
    dv = tl.zeros((COLUMNS, 2 * HALF_PAD), tl.float32)
    for member in range(HEADS_EACH):
        head = group * GROUP + split * HEADS_EACH + member
        q_head = Q + tl.cast(head, tl.int64) * stride_qh
        dout_head = DOUT + head * (2 * HALF)
        lse_head = LSE + tl.cast(head, tl.int64) * num_tokens
        delta_head = DELTA + tl.cast(head, tl.int64) * num_tokens
        dk, dv = _dkdv_over_queries(
            dk, dv, k, v, middle, reach, q_head, dout_head, lse_head, delta_head, stride_qt, stride_ot, scale_log2,
            num_tokens, start, full_from, ROWS, HALF, HALF_PAD, True, True, PRECISION,
        )  # fmt: skip
        dk, dv = _dkdv_over_queries(
            dk, dv, k, v, middle, reach, q_head, dout_head, lse_head, delta_head, stride_qt, stride_ot, scale_log2,
            num_tokens, full_from, full_to, ROWS, HALF, HALF_PAD, False, False, PRECISION,
        )  # fmt: skip
        dk, dv = _dkdv_over_queries(
            dk, dv, k, v, middle, reach, q_head, dout_head, lse_head, delta_head, stride_qt, stride_ot, scale_log2,
            num_tokens, full_to, end, ROWS, HALF, HALF_PAD, True, False, PRECISION,
        )  # fmt: skip
    num_groups = tl.num_programs(1)
    stride_pt = num_groups * (2 * HALF)
    part = (tl.cast(split, tl.int64) * num_keys + key_start) * stride_pt + group * (2 * HALF)
    offset = key_in_tile[:, None] * stride_pt + column[None, :]
    ok = is_real[:, None] & column_ok[None, :]
    tl.store(DK_PART + part + offset, dk, mask=ok)
    tl.store(DV_PART + part + offset, dv, mask=ok)
