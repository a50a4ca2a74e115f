"""Latent cross-entropy on Triton: a registered operator whose forward also makes the gradient."""

import torch
import triton
from torch import Tensor

from laver_kernels.latent_cross_entropy.kernels import latent_cross_entropy_rows
from laver_kernels.launch import inner_contiguous, on_device_of, want_kernel_dtype

MAX_WIDTH = 32768  # a row and its target are kept in registers


def latent_cross_entropy(
    student_NK: Tensor,
    teacher_NK: Tensor,
    rows_M: Tensor,
    center_K: Tensor | None,
    student_temperature: float,
    teacher_temperature: float,
) -> Tensor:
    """The operation of `api.latent_cross_entropy` for fp16, bf16 and fp32."""
    want_kernel_dtype("latent_cross_entropy", student_NK, teacher_NK)
    if student_NK.shape[1] > MAX_WIDTH:
        raise ValueError(f"latent_cross_entropy: width {student_NK.shape[1]}, want at most {MAX_WIDTH}")
    want_grad = student_NK.requires_grad and torch.is_grad_enabled()
    if center_K is not None:
        center_K = center_K.detach()
    loss, _ = forward_op(
        student_NK, teacher_NK.detach(), rows_M, center_K, student_temperature, teacher_temperature, want_grad
    )
    return loss


@torch.library.custom_op("laver_kernels::latent_cross_entropy", mutates_args=())
def forward_op(
    student_NK: Tensor,
    teacher_NK: Tensor,
    rows_M: Tensor,
    center_K: Tensor | None,
    student_temperature: float,
    teacher_temperature: float,
    want_grad: bool,
) -> tuple[Tensor, Tensor]:
    """Loss, and the gradient of the masked rows `[M, K]` (empty unless `want_grad`)."""
    num_rows, width = rows_M.shape[0], student_NK.shape[1]
    student, teacher = inner_contiguous(student_NK), inner_contiguous(teacher_NK)
    loss_M = torch.empty(num_rows, dtype=torch.float32, device=student.device)
    grad_MK = torch.empty(num_rows if want_grad else 0, width, dtype=student.dtype, device=student.device)
    width_pad = triton.next_power_of_2(width)
    with on_device_of(student):
        latent_cross_entropy_rows[(num_rows,)](
            student, teacher, teacher if center_K is None else center_K.contiguous(), rows_M.contiguous(),
            loss_M, grad_MK, 1.0 / student_temperature, 1.0 / teacher_temperature, width,
            student.stride(0), teacher.stride(0),
            WIDTH_PAD=width_pad, HAS_CENTER=center_K is not None, WANT_GRAD=want_grad,
            num_warps=max(1, min(16, width_pad // 512)),
        )  # fmt: skip
    return loss_M.sum(), grad_MK


@forward_op.register_fake
def _(student_NK, teacher_NK, rows_M, center_K, student_temperature, teacher_temperature, want_grad):
    num_rows = rows_M.shape[0] if want_grad else 0
    return student_NK.new_empty((), dtype=torch.float32), student_NK.new_empty(
        (num_rows, student_NK.shape[1])
    )


def _save_for_backward(ctx, inputs, output) -> None:
    student_NK, _, rows_M, *_ = inputs
    _, grad_MK = output
    ctx.mark_non_differentiable(grad_MK)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(rows_M, grad_MK)
    ctx.student_shape = student_NK.shape


def _backward(ctx, grad, *_):
    if grad is None:
        return (None,) * 7
    rows_M, grad_MK = ctx.saved_tensors
    dstudent_NK = grad_MK.new_zeros(ctx.student_shape)
    # Rows are distinct: a copy, not an addition, and so in a fixed order. In place: `index_copy` would copy the zeros.
    dstudent_NK.index_copy_(0, rows_M, (grad_MK * grad).to(grad_MK.dtype))
    return dstudent_NK, None, None, None, None, None, None


forward_op.register_autograd(_backward, setup_context=_save_for_backward)
