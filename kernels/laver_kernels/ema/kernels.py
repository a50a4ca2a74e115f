"""EMA kernel: one pass that reads average and source, and writes the average and its rounded copy."""

import triton
import triton.language as tl


@triton.jit
def ema_step(
    AVERAGE, SOURCE, COPY, MOMENTUM, momentum, num_elements,
    BLOCK: tl.constexpr, MOMENTUM_ON_DEVICE: tl.constexpr, HAS_COPY: tl.constexpr,
):  # fmt: skip
    """average += (1 - momentum) (source - average) in fp32; int64 indices, shards may pass 2^31 elements."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    ok = at < num_elements
    if MOMENTUM_ON_DEVICE:
        momentum = tl.load(MOMENTUM).to(tl.float32)
    average = tl.load(AVERAGE + at, mask=ok, other=0.0)
    source = tl.load(SOURCE + at, mask=ok, other=0.0).to(tl.float32)
    average += (1.0 - momentum) * (source - average)
    tl.store(AVERAGE + at, average, mask=ok)
    if HAS_COPY:
        tl.store(COPY + at, average.to(COPY.dtype.element_ty), mask=ok)
