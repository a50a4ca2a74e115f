"""The teacher's matrix products in fp8: e4m3 codes, one scale a row, bf16 out.

    s_i = 2^k, the smallest power of two with max_k |x_ik| <= 448 s_i        likewise t_j for the rows of the weight
    y_ij = s_i t_j sum_k q(x_ik / s_i) q(w_jk / t_j) + b_j                   q: nearest e4m3 number, ties to even

That is the decoder's products. The vision head keeps the model's precision: it is 0.3 % of a 7B decoder's work and has
most of the harm (docs/engine.md).

A code is off by at most 2^-4 of its number, or by 2^-10 scales below 2^-6 of them. Scales are powers of two because
dividing by them is exact: above that floor a code does not depend on its row's scale, so that a tensor-parallel rank,
whose scales know its part of a row alone, makes the codes that one process makes, without exchanging maxima. They cost
no accuracy, e4m3 being a floating-point format; at most one of its 18 binades stays empty.

Activations are quantised at every product: reading for the maximum, dividing and casting move 9 bytes a number in
bf16. A weight is quantised once after each move of the teacher and its codes are kept (1 byte a parameter, and 4 a
row), because 9 bytes a weight in every pass take about as long as fp8 saves with 1,500 rows a pass.
"""

import contextlib
from collections.abc import Iterator

import torch
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    gather_from_sequence_parallel_region,
)
from torch.distributed import ProcessGroup

_BELOW_ROUNDING_UP = 2**21 - 1
"""Added to the bits of an fp32 number, it carries into the exponent above 1.75 times a power of two: 448 = 1.75 2^8."""

Rows8 = tuple[torch.Tensor, torch.Tensor]
"""Codes [M, K] in e4m3 and fp32 scales [M, 1]."""


def quantize_rows(rows_MK: torch.Tensor) -> Rows8:
    """The e4m3 codes of a matrix and its rows' scales, as the module's formula says.

    A row that holds an infinity or a NaN becomes NaN as a whole.
    """
    largest_M1 = torch.linalg.vector_norm(
        rows_MK, ord=float("inf"), dim=-1, keepdim=True, dtype=torch.float32
    )
    bits_M1 = largest_M1.view(torch.int32)
    # The scale's exponent field; at the ends it stays where the scale and its reciprocal are normal numbers.
    exponent_M1 = (((bits_M1 + _BELOW_ROUNDING_UP) >> 23) - 8).clamp(1, 253)
    scale_M1 = (exponent_M1 << 23).view(torch.float32)
    reciprocal_M1 = ((254 - exponent_M1) << 23).view(torch.float32)
    scale_M1 = torch.where(largest_M1.isfinite(), scale_M1, torch.nan)
    return (rows_MK * reciprocal_M1.to(rows_MK.dtype)).to(torch.float8_e4m3fn), scale_M1


def multiply(left: Rows8, right: Rows8, dtype: torch.dtype) -> torch.Tensor:
    """Rows [M, K] x rows [N, K] -> [M, N]: on a GPU through bf16, elsewhere from fp32 sums."""
    (left_MK, left_M1), (right_NK, right_N1) = left, right
    if left_MK.is_cuda:
        product_MN = torch._scaled_mm(
            left_MK, right_NK.t(), scale_a=left_M1, scale_b=right_N1.t(), out_dtype=torch.bfloat16
        )
        return product_MN.to(dtype)
    return ((left_MK.float() @ right_NK.float().t()) * left_M1 * right_N1.t()).to(dtype)


class Fp8Pass:
    """Whether the teacher's pass runs in fp8 right now, and the codes of its weights until it moves."""

    def __init__(self) -> None:
        self.running = False
        self._weights: dict[torch.Tensor, Rows8] = {}

    @property
    def num_bytes(self) -> int:
        """Bytes of codes and scales that are kept."""
        return sum(tensor.nbytes for pair in self._weights.values() for tensor in pair)

    @contextlib.contextmanager
    def run(self) -> Iterator[None]:
        """Everything that is called in this context is the teacher's."""
        self.running = True
        try:
            yield
        finally:
            self.running = False

    def forget(self) -> None:
        """The teacher's weights have changed."""
        self._weights.clear()

    def linear(
        self,
        rows: torch.Tensor,
        weight_NK: torch.nn.Parameter,
        bias_N: torch.Tensor | None,
        gather_over: ProcessGroup | None = None,
    ) -> torch.Tensor:
        """Rows [..., K] -> [..., N], without gradients; the first dimension whole over the group `gather_over`.

        It is the codes that are gathered: half of bf16's bytes.
        """
        codes_MK, scale_M1 = quantize_rows(rows.flatten(0, -2))
        leading = list(rows.shape[:-1])
        if gather_over is not None:
            bytes_MK = codes_MK.view(torch.uint8)
            codes_MK = gather_from_sequence_parallel_region(bytes_MK, group=gather_over).view(codes_MK.dtype)
            scale_M1 = gather_from_sequence_parallel_region(scale_M1, group=gather_over)
            leading[0] *= gather_over.size()
        if weight_NK not in self._weights:
            self._weights[weight_NK] = quantize_rows(weight_NK)
        out_MN = multiply((codes_MK, scale_M1), self._weights[weight_NK], rows.dtype)
        if bias_N is not None:
            out_MN += bias_N
        return out_MN.unflatten(0, leading)


class _Fp8Teacher:
    """A Megatron linear layer that computes in fp8 while the teacher's pass is running."""

    def __init__(self, *args, fp8: Fp8Pass, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self._fp8 = fp8

    def _forward_impl(self, input, weight, *args, **kwargs):
        if not self._fp8.running:
            return super()._forward_impl(input, weight, *args, **kwargs)  # type: ignore[misc]
        group = kwargs["tp_group"] if kwargs["sequence_parallel"] else None
        return self._fp8.linear(input, weight, kwargs["bias"], group)


class Fp8ColumnParallelLinear(_Fp8Teacher, ColumnParallelLinear):
    """Column-parallel: with sequence parallelism it gathers its input's codes."""


class Fp8RowParallelLinear(_Fp8Teacher, RowParallelLinear):
    """Row-parallel: a rank's scales are those of its part of each row."""
