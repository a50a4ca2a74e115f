"""Elementwise kernels around attention: the rotation of q and k before it, the sum of dk and dv after it."""

import triton
import triton.language as tl


@triton.jit
def rotate_queries_and_keys(
    Q, K, Q_OUT, K_OUT, COS, SIN, num_tokens, stride_qt, stride_qh, stride_kt, stride_kh,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, ROWS: tl.constexpr, HALF: tl.constexpr, HALF_PAD: tl.constexpr,
):  # fmt: skip
    """Rotates every head of Q and K once, into dense `[T, heads, D]`; in the loop it would repeat."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    head = tl.program_id(1)
    frequency = tl.arange(0, HALF_PAD)
    ok = (row < num_tokens)[:, None] & (frequency < HALF)[None, :]
    row64 = row.to(tl.int64)[:, None]
    c = tl.load(COS + row64 * HALF + frequency[None, :], mask=ok, other=1.0)
    s = tl.load(SIN + row64 * HALF + frequency[None, :], mask=ok, other=0.0)
    if head < HEADS:
        source = Q + row64 * stride_qt + tl.cast(head, tl.int64) * stride_qh + frequency[None, :]
        target = Q_OUT + (row64 * HEADS + head) * (2 * HALF) + frequency[None, :]
        _rotate(source, target, c, s, ok, HALF)
    else:
        group = head - HEADS
        source = K + row64 * stride_kt + tl.cast(group, tl.int64) * stride_kh + frequency[None, :]
        target = K_OUT + (row64 * GROUPS + group) * (2 * HALF) + frequency[None, :]
        _rotate(source, target, c, s, ok, HALF)


@triton.jit
def _rotate(source, target, c, s, ok, HALF: tl.constexpr):
    first = tl.load(source, mask=ok, other=0.0).to(tl.float32)
    second = tl.load(source + HALF, mask=ok, other=0.0).to(tl.float32)
    dtype = target.dtype.element_ty
    tl.store(target, (first * c - second * s).to(dtype), mask=ok)
    tl.store(target + HALF, (second * c + first * s).to(dtype), mask=ok)


@triton.jit
def combine_partials(
    DK_PART, DV_PART, DK, DV, COS, SIN, softmax_scale, num_tokens,
    GROUPS: tl.constexpr, SPLITS: tl.constexpr, ROTATE: tl.constexpr,
    ROWS: tl.constexpr, HALF: tl.constexpr, HALF_PAD: tl.constexpr,
):  # fmt: skip
    """Sums the partial gradients of one key head in a fixed order, rotates dk back, and rounds once."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    group = tl.program_id(1)
    frequency = tl.arange(0, HALF_PAD)
    ok = (row < num_tokens)[:, None] & (frequency < HALF)[None, :]
    row64 = row.to(tl.int64)[:, None]
    at = (row64 * GROUPS + group) * (2 * HALF) + frequency[None, :]
    split_stride = tl.cast(num_tokens, tl.int64) * (GROUPS * 2 * HALF)
    dk_first = tl.zeros((ROWS, HALF_PAD), tl.float32)
    dk_second = tl.zeros((ROWS, HALF_PAD), tl.float32)
    dv_first = tl.zeros((ROWS, HALF_PAD), tl.float32)
    dv_second = tl.zeros((ROWS, HALF_PAD), tl.float32)
    for split in tl.static_range(SPLITS):
        part = at + split * split_stride
        dk_first += tl.load(DK_PART + part, mask=ok, other=0.0)
        dk_second += tl.load(DK_PART + part + HALF, mask=ok, other=0.0)
        dv_first += tl.load(DV_PART + part, mask=ok, other=0.0)
        dv_second += tl.load(DV_PART + part + HALF, mask=ok, other=0.0)
    if ROTATE:
        c = tl.load(COS + row64 * HALF + frequency[None, :], mask=ok, other=1.0)
        s = tl.load(SIN + row64 * HALF + frequency[None, :], mask=ok, other=0.0)
        dk_first, dk_second = dk_first * c + dk_second * s, dk_second * c - dk_first * s
    dtype = DK.dtype.element_ty
    tl.store(DK + at, (dk_first * softmax_scale).to(dtype), mask=ok)
    tl.store(DK + at + HALF, (dk_second * softmax_scale).to(dtype), mask=ok)
    tl.store(DV + at, dv_first.to(dtype), mask=ok)
    tl.store(DV + at + HALF, dv_second.to(dtype), mask=ok)
