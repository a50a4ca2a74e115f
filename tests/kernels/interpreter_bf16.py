"""Repair of Triton's interpreter for bf16, for tests only.

It holds bf16 as raw uint16 and multiplies those as integers in a dot; fp32 -> bf16 truncates. The kernels do
arithmetic in fp32 and use bf16 only in loads, stores, casts and dots: those are what this puts right.
"""

import numpy as np
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


def _to_fp32(handle: TensorHandle) -> TensorHandle:
    if handle.dtype.scalar != tl.bfloat16:
        return handle
    return TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


def _to_bf16(handle: TensorHandle) -> TensorHandle:
    """Rounds fp32 to the nearest bf16, ties to even; NaN stays NaN."""
    bits = np.ascontiguousarray(handle.data).view(np.uint32).astype(np.uint64)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return TensorHandle(np.where(np.isnan(handle.data), np.uint16(0x7FC0), rounded), tl.bfloat16)


def repair(monkeypatch) -> None:
    """Patches dot and the casts for the duration of a test."""
    dot, cast = InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl

    def create_dot(self, a, b, *rest):
        return dot(self, _to_fp32(a), _to_fp32(b), *rest)

    def cast_impl(self, source, target):
        if source.dtype.scalar == tl.float32 and target.scalar == tl.bfloat16:
            return _to_bf16(source)
        if source.dtype.scalar == tl.bfloat16 and target.scalar == tl.float32:
            return _to_fp32(source)
        return cast(self, source, target)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", create_dot)
    monkeypatch.setattr(InterpreterBuilder, "cast_impl", cast_impl)
    for name in ("create_fp_trunc", "create_fp_ext"):
        monkeypatch.setattr(InterpreterBuilder, name, lambda self, source, to: self.cast_impl(source, to))
