"""Cross-entropy kernels over a chunk of logits: statistics in one pass, the gradient in place in a second.

Between the two, tensor-parallel ranks reduce the statistics; the logits themselves come from cuBLAS.
"""

import triton
import triton.language as tl


@triton.jit
def logit_statistics(
    LOGITS, TARGETS, MAX, SUM, PICKED, vocab_start, num_real, stride, STEP: tl.constexpr
):  # fmt: skip
    """Per row over the real columns: maximum, sum of exp(logit - maximum), and the target's logit."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, STEP)
    base = LOGITS + row * stride
    # Running maxima per lane start finite: a shard of padding alone must give a sum of 0, not NaN.
    lane_max = tl.full((STEP,), -1e30, tl.float32)
    lane_sum = tl.zeros((STEP,), tl.float32)
    for start in range(0, num_real, STEP):
        ok = start + column < num_real
        x = tl.load(base + start + column, mask=ok, other=-float("inf")).to(tl.float32)
        new_max = tl.maximum(lane_max, x)
        lane_sum = lane_sum * tl.exp(lane_max - new_max) + tl.exp(x - new_max)
        lane_max = new_max
    row_max = tl.max(lane_max, 0)
    target = tl.load(TARGETS + row) - vocab_start
    is_here = (target >= 0) & (target < num_real)
    picked = tl.load(base + target, mask=is_here, other=0.0).to(tl.float32)
    tl.store(MAX + row, row_max)
    tl.store(SUM + row, tl.sum(lane_sum * tl.exp(lane_max - row_max), 0))
    tl.store(PICKED + row, picked)


@triton.jit
def logit_gradient(
    LOGITS, TARGETS, LSE, WEIGHT, vocab_start, num_real, num_columns, stride,
    STEP: tl.constexpr, HAS_WEIGHT: tl.constexpr,
):  # fmt: skip
    """In place: softmax minus one at the target, times the loss's weight; padding columns get 0."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * STEP + tl.arange(0, STEP)
    at = LOGITS + row * stride + column
    x = tl.load(at, mask=column < num_real, other=-float("inf")).to(tl.float32)
    p = tl.exp(x - tl.load(LSE + row))
    p = tl.where(column == tl.load(TARGETS + row) - vocab_start, p - 1.0, p)
    if HAS_WEIGHT:
        p *= tl.load(WEIGHT)
    tl.store(at, tl.where(column < num_real, p, 0.0).to(LOGITS.dtype.element_ty), mask=column < num_columns)
