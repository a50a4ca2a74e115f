"""Mixed attention on Triton: three registered operators (rotate, forward, backward) and their autograd."""

import functools
import math

import torch
import triton
from torch import Tensor

from laver_kernels.configs import SPECIALISED_TILE, architecture, attention_tile, padded
from laver_kernels.launch import (
    cdiv,
    descriptor_memory,
    dot_precision,
    inner_contiguous,
    launch,
    on_device_of,
    regular,
    runs_directly,
    specialises,
    want_kernel_dtype,
)
from laver_kernels.mixed_attention.backward_kernels import attention_backward_dkdv, attention_backward_dq
from laver_kernels.mixed_attention.forward_kernel import attention_forward
from laver_kernels.mixed_attention.intervals import Intervals
from laver_kernels.mixed_attention.rotation_kernels import combine_partials, rotate_queries_and_keys
from laver_kernels.mixed_attention.specialised_kernel import attention_forward_specialised

LOG2_E = math.log2(math.e)
ELEMENTWISE_ROWS = 16
TRITON_DEFAULTS = {"num_warps": 4, "num_stages": 3}  # of the elementwise kernels


def mixed_attention(
    q_THD: Tensor,
    k_TGD: Tensor,
    v_TGD: Tensor,
    intervals: Intervals,
    rope: tuple[Tensor, Tensor] | None,
    softmax_scale: float,
    return_lse: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Output and, where wanted, log-sum-exps of `api.mixed_attention` for fp16, bf16 and fp32."""
    want_kernel_dtype("mixed_attention", q_THD)
    cos_TF, sin_TF = (None, None) if rope is None else rope
    bounds = (intervals.row_lo_T, intervals.row_hi_T, intervals.col_lo_T, intervals.col_hi_T)
    rest = (*bounds, cos_TF, sin_TF, softmax_scale)
    if runs_directly(q_THD, k_TGD, v_TGD):
        out_THD, lse_HT = _Attention.apply(q_THD, k_TGD, v_TGD, rest)
    else:
        out_THD, lse_HT, *_ = forward_op(q_THD, k_TGD, v_TGD, *rest)
    if not return_lse:
        return out_THD, None
    # In base 2 and +inf where a row sees nothing, so that the backward's exp2(score - lse) is 0 there.
    return out_THD, torch.where(lse_HT < float("inf"), lse_HT / LOG2_E, -float("inf"))


def forward(
    q_THD: Tensor,
    k_TGD: Tensor,
    v_TGD: Tensor,
    row_lo_T: Tensor,
    row_hi_T: Tensor,
    col_lo_T: Tensor,
    col_hi_T: Tensor,
    cos_TF: Tensor | None,
    sin_TF: Tensor | None,
    softmax_scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Output, LSE `[H, T]`, and rotated q and k (empty without rotation): what the backward needs."""
    num_tokens, num_heads, head_dim = q_THD.shape
    num_groups = k_TGD.shape[1]
    q, k, v = (inner_contiguous(x) for x in (q_THD, k_TGD, v_TGD))
    out_THD = torch.empty(q_THD.shape, dtype=q.dtype, device=q.device)
    lse_HT = torch.empty(num_heads, num_tokens, dtype=torch.float32, device=q.device)
    half = head_dim // 2
    bounds = (row_lo_T.contiguous(), row_hi_T.contiguous())
    tensors = (q, k, v, *bounds) if cos_TF is None or sin_TF is None else (q, k, v, *bounds, cos_TF, sin_TF)
    strides = (*q.stride()[:2], *k.stride()[:2], *v.stride()[:2], num_heads * head_dim)
    key = regular(tensors, strides, (num_tokens, k.shape[0]))
    constants = {"GROUP": num_heads // num_groups, "HALF": half, "PRECISION": dot_precision(q.dtype)}
    # Descriptors want aligned rows; four-byte values have no tile that fits.
    if key is not None and head_dim == 128 and q.dtype.itemsize == 2 and specialises(q.device):
        kernel, tile = attention_forward_specialised, SPECIALISED_TILE
        triton.set_allocator(descriptor_memory)
    else:
        kernel, tile = attention_forward, attention_tile("forward", architecture(q.device), head_dim, q.dtype)
        constants["HALF_PAD"] = padded(head_dim) // 2
    with on_device_of(q):
        if cos_TF is not None and sin_TF is not None:
            q, k = _rotated(q, k, cos_TF.contiguous(), sin_TF.contiguous(), key)
            saved = (q, k)
        else:
            saved = (q.new_empty(0), q.new_empty(0))
        launch(
            kernel, (cdiv(num_tokens, tile.rows), num_heads, 1), key,
            q, k, v, out_THD, lse_HT, *bounds,
            softmax_scale * LOG2_E, num_tokens, k.shape[0],
            q.stride(0), q.stride(1), k.stride(0), k.stride(1), v.stride(0), v.stride(1), out_THD.stride(0),
            **constants, ROWS=tile.rows, COLUMNS=tile.columns, num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip
    return out_THD, lse_HT, *saved


forward_op = torch.library.custom_op("laver_kernels::mixed_attention", forward, mutates_args=())


@forward_op.register_fake
def _(q_THD, k_TGD, v_TGD, row_lo_T, row_hi_T, col_lo_T, col_hi_T, cos_TF, sin_TF, softmax_scale):
    out_THD = q_THD.new_empty(q_THD.shape)
    lse_HT = q_THD.new_empty((q_THD.shape[1], q_THD.shape[0]), dtype=torch.float32)
    if cos_TF is None:
        return out_THD, lse_HT, q_THD.new_empty(0), q_THD.new_empty(0)
    return out_THD, lse_HT, q_THD.new_empty(q_THD.shape), k_TGD.new_empty(k_TGD.shape)


def _rotated(
    q_THD: Tensor, k_TGD: Tensor, cos_TF: Tensor, sin_TF: Tensor, key: tuple | None
) -> tuple[Tensor, Tensor]:
    num_tokens, num_heads, head_dim = q_THD.shape
    num_groups = k_TGD.shape[1]
    q_out = torch.empty(q_THD.shape, dtype=q_THD.dtype, device=q_THD.device)
    k_out = torch.empty(k_TGD.shape, dtype=k_TGD.dtype, device=k_TGD.device)
    grid = (cdiv(num_tokens, ELEMENTWISE_ROWS), num_heads + num_groups, 1)
    launch(
        rotate_queries_and_keys, grid, key,
        q_THD, k_TGD, q_out, k_out, cos_TF, sin_TF, num_tokens,
        q_THD.stride(0), q_THD.stride(1), k_TGD.stride(0), k_TGD.stride(1),
        HEADS=num_heads, GROUPS=num_groups, ROWS=ELEMENTWISE_ROWS,
        HALF=head_dim // 2, HALF_PAD=padded(head_dim) // 2, **TRITON_DEFAULTS,
    )  # fmt: skip
    return q_out, k_out


def backward(
    dout_THD: Tensor,
    dlse_HT: Tensor | None,
    out_THD: Tensor,
    lse_HT: Tensor,
    q_THD: Tensor,
    k_TGD: Tensor,
    v_TGD: Tensor,
    row_lo_T: Tensor,
    row_hi_T: Tensor,
    col_lo_T: Tensor,
    col_hi_T: Tensor,
    cos_TF: Tensor | None,
    sin_TF: Tensor | None,
    softmax_scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v before rotation, from rotated q and k; `dlse_HT` is of LSE in base 2."""
    q, k, v = (inner_contiguous(x) for x in (q_THD, k_TGD, v_TGD))
    dout = dout_THD.contiguous()
    # Without rotation the kernels never read the table; any fp32 pointer stands in.
    table = (lse_HT, lse_HT)
    if cos_TF is not None and sin_TF is not None:
        table = (cos_TF.contiguous(), sin_TF.contiguous())
    shape = {
        "GROUP": q.shape[1] // k.shape[1],
        "HALF": q.shape[2] // 2,
        "HALF_PAD": padded(q.shape[2]) // 2,
        "PRECISION": dot_precision(q.dtype),
    }
    strides = (*q.stride()[:2], *k.stride()[:2], *v.stride()[:2], dout.stride(0))
    rows, columns = (
        (row_lo_T.contiguous(), row_hi_T.contiguous()),
        (col_lo_T.contiguous(), col_hi_T.contiguous()),
    )
    rotate = cos_TF is not None
    key = regular(
        (q, k, v, out_THD, dout, lse_HT, *table, *rows, *columns), strides, (q.shape[0], k.shape[0])
    )
    with on_device_of(q):
        dq, delta_HT = _launch_dq(
            key, q, k, v, out_THD, dout, lse_HT, dlse_HT, table, rows, softmax_scale, rotate, strides, shape
        )
        dk_part, dv_part = _launch_dkdv(
            key, q, k, v, dout, lse_HT, delta_HT, columns, softmax_scale, strides, shape
        )
        dk, dv = _combine(key, dk_part, dv_part, k, table, softmax_scale, rotate)
    return dq, dk, dv


def _launch_dq(key, q, k, v, out, dout, lse, dlse, table, rows, softmax_scale, rotate, strides, shape):
    num_tokens, num_heads, head_dim = q.shape
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    delta = torch.empty_like(lse)
    # To a score in natural units; without a gradient of LSE the kernel reads none.
    dlse_natural = lse if dlse is None else (dlse * LOG2_E).contiguous()
    tile = attention_tile("dq", architecture(q.device), head_dim, q.dtype)
    launch(
        attention_backward_dq, (cdiv(num_tokens, tile.rows), num_heads, 1), key,
        q, k, v, out, dout, lse, dlse_natural, delta, dq, *table, *rows, softmax_scale, softmax_scale * LOG2_E,
        num_tokens, k.shape[0], *strides, **shape, ROTATE=rotate, HAS_DLSE=dlse is not None,
        ROWS=tile.rows, COLUMNS=tile.columns, num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    return dq, delta


def _launch_dkdv(key, q, k, v, dout, lse, delta, columns, softmax_scale, strides, shape):
    num_keys, num_groups, head_dim = k.shape
    group = shape["GROUP"]
    tile = attention_tile("dkdv", architecture(q.device), head_dim, q.dtype)
    key_tiles = cdiv(num_keys, tile.columns)
    splits = head_splits(key_tiles * num_groups, group, q.device)
    dk_part, dv_part = (torch.empty(splits, *k.shape, dtype=torch.float32, device=q.device) for _ in range(2))
    launch(
        attention_backward_dkdv, (key_tiles, num_groups, splits), key,
        q, k, v, dout, lse, delta, dk_part, dv_part, *columns, softmax_scale * LOG2_E, q.shape[0], num_keys,
        *strides, **shape, HEADS_EACH=group // splits, ROWS=tile.rows, COLUMNS=tile.columns,
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    return dk_part, dv_part


def _combine(key, dk_part, dv_part, k, table, softmax_scale, rotate):
    num_tokens, num_groups, head_dim = k.shape
    dk, dv = (torch.empty(k.shape, dtype=k.dtype, device=k.device) for _ in range(2))
    launch(
        combine_partials, (cdiv(num_tokens, ELEMENTWISE_ROWS), num_groups, 1), key,
        dk_part, dv_part, dk, dv, *table, softmax_scale, num_tokens, GROUPS=num_groups,
        SPLITS=dk_part.shape[0], ROTATE=rotate, ROWS=ELEMENTWISE_ROWS,
        HALF=head_dim // 2, HALF_PAD=padded(head_dim) // 2, **TRITON_DEFAULTS,
    )  # fmt: skip
    return dk, dv


backward_op = torch.library.custom_op("laver_kernels::mixed_attention_backward", backward, mutates_args=())


@backward_op.register_fake
def _(dout, dlse, out, lse, q, k, v, row_lo, row_hi, col_lo, col_hi, cos, sin, softmax_scale):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def head_splits(programs: int, group: int, device: torch.device) -> int:
    """Into how many partial sums the query heads of a group are split: one program each, or one for all.

    A program per query head fills the GPU on short sequences and costs a partial dk and dv per head; once
    there are several programs per multiprocessor without it, one program walks all heads.
    """
    if device.type != "cuda":
        return group
    return 1 if programs >= 8 * _multiprocessors(device) else group


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _save_for_backward(ctx, inputs, output) -> None:
    q, k, v, row_lo, row_hi, col_lo, col_hi, cos, sin, softmax_scale = inputs
    out, lse, q_rotated, k_rotated = output
    ctx.mark_non_differentiable(q_rotated, k_rotated)
    ctx.set_materialize_grads(False)
    if cos is not None:
        q, k = q_rotated, k_rotated
    ctx.save_for_backward(out, lse, q, k, v, row_lo, row_hi, col_lo, col_hi, cos, sin)
    ctx.softmax_scale = softmax_scale


def _backward(ctx, dout, dlse, *_):
    if dout is None and dlse is None:
        return (None,) * 10
    if dout is None:
        dout = torch.zeros_like(ctx.saved_tensors[0])
    dq, dk, dv = backward_op(dout, dlse, *ctx.saved_tensors, ctx.softmax_scale)
    return dq, dk, dv, *(None,) * 7


class _Attention(torch.autograd.Function):
    """The same without the dispatcher, for eager calls; `rest` are the inputs that get no gradient."""

    @staticmethod
    def forward(ctx, q_THD, k_TGD, v_TGD, rest):
        out_THD, lse_HT, q, k = forward(q_THD, k_TGD, v_TGD, *rest)
        ctx.set_materialize_grads(False)
        if rest[4] is None:
            q, k = q_THD, k_TGD
        ctx.save_for_backward(out_THD, lse_HT, q, k, v_TGD)
        ctx.rest = rest
        return out_THD, lse_HT

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dout, dlse):
        if dout is None and dlse is None:
            return None, None, None, None
        if dout is None:
            dout = torch.zeros_like(ctx.saved_tensors[0])
        run = backward if runs_directly(dout) else backward_op
        return *run(dout, dlse, *ctx.saved_tensors, *ctx.rest), None


forward_op.register_autograd(_backward, setup_context=_save_for_backward)
