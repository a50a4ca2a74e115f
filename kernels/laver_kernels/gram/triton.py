"""Gram loss on Triton: registered forward and backward operators over waves of images."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from laver_kernels.configs import Tile, architecture, gram_tile
from laver_kernels.gram import waves
from laver_kernels.gram.kernels import gram_backward, gram_forward, inverse_norms
from laver_kernels.launch import cdiv, dot_precision, inner_contiguous, on_device_of, want_kernel_dtype


def gram_loss(student_NK: Tensor, teacher_NK: Tensor, lengths: tuple[int, ...], clip: bool) -> Tensor:
    """The operation of `api.gram_loss` for fp16, bf16 and fp32."""
    want_kernel_dtype("gram_loss", student_NK)
    want_grad = student_NK.requires_grad and torch.is_grad_enabled()
    loss, *_ = forward_op(student_NK, teacher_NK.detach(), list(lengths), clip, want_grad)
    return loss


def _w_dtype(dtype: torch.dtype) -> torch.dtype:
    # W = R / (||z_i|| ||z_j||) is about 1e-6 for a 3584-wide latent: too small for fp16.
    return torch.float32 if dtype == torch.float16 else dtype


@dataclass(frozen=True, kw_only=True)
class _Layout:
    """Tiles and host-side sizes for one dtype, device and tuple of lengths; needs no tensor."""

    lengths: tuple[int, ...]
    gram: Tile
    gradient: Tile
    w_dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, student_NK: Tensor, lengths: Sequence[int]) -> "_Layout":
        arch, dtype = architecture(student_NK.device), student_NK.dtype
        return cls(
            lengths=tuple(int(length) for length in lengths),
            gram=gram_tile("forward", arch, dtype),
            gradient=gram_tile("backward", arch, dtype),
            w_dtype=_w_dtype(dtype),
            device=student_NK.device,
        )

    @property
    def max_elements(self) -> int:
        return waves.WORKSPACE_BYTES // self.w_dtype.itemsize

    @property
    def num_blocks(self) -> int:
        """The most tiles along one side of an image."""
        return cdiv(max(self.lengths), self.gram.rows)

    def split(self) -> tuple[waves.Split, ...]:
        return waves.split(self.lengths, self.gram.rows, self.gradient.rows, self.max_elements)

    def plan(self) -> waves.Plan:
        return waves.plan_of(self.lengths, self.gram.rows, self.gradient.rows, self.max_elements, self.device)

    def kept_elements(self) -> int:
        """Elements of W that the forward keeps for the backward."""
        found = self.split()
        return sum(wave.w_elements for wave in found[: waves.num_kept(found)])


@dataclass(frozen=True, kw_only=True)
class _Latents:
    """Student, teacher (None where only the gradient's product runs) and the inverse norms of their rows."""

    student: Tensor
    teacher: Tensor | None
    r_student: Tensor
    r_teacher: Tensor | None


@torch.library.custom_op("laver_kernels::gram_loss", mutates_args=())
def forward_op(
    student_NK: Tensor, teacher_NK: Tensor, lengths: list[int], clip: bool, want_grad: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss, and for the backward the first wave's W and row dots (empty unless `want_grad`), inverse norms."""
    layout = _Layout.of(student_NK, lengths)
    plan = layout.plan()
    student, teacher = inner_contiguous(student_NK), inner_contiguous(teacher_NK)
    num_rows, width = student.shape
    w = torch.empty(want_grad * layout.kept_elements(), dtype=layout.w_dtype, device=student.device)
    dots_shape = _dots_shape(layout, num_rows, want_grad)
    dots = torch.empty(dots_shape, dtype=torch.float32, device=student.device)
    r_student, r_teacher = (
        torch.empty(num_rows, dtype=torch.float32, device=student.device) for _ in range(2)
    )
    latents = _Latents(student=student, teacher=teacher, r_student=r_student, r_teacher=r_teacher)
    losses = []
    with on_device_of(student):
        inverse_norms[(num_rows,)](
            student, teacher, r_student, r_teacher, width, student.stride(0), teacher.stride(0),
            WIDTH_STEP=min(2048, triton.next_power_of_2(width)),
        )  # fmt: skip
        for wave in plan.waves[: plan.num_kept]:
            losses.append(_launch_gram(latents, w, dots, wave.gram_tiles, wave, layout, clip, want_grad))
        if len(plan.other_tiles):
            losses.append(
                _launch_gram(latents, w, dots, plan.other_tiles, plan.waves[-1], layout, clip, False)
            )
    return torch.cat(losses).sum(), w, dots, r_student, r_teacher


def _dots_shape(layout: _Layout, num_rows: int, want_grad: bool) -> tuple[int, int]:
    """Of the kept wave: nothing where the forward keeps none."""
    return (layout.num_blocks if want_grad and layout.kept_elements() else 0, num_rows)


def _launch_gram(
    latents: _Latents, w: Tensor, dots: Tensor, tiles: Tensor, wave: waves.Wave, layout: _Layout,
    clip: bool, want_grad: bool,
) -> Tensor:  # fmt: skip
    """Gram tiles of student and teacher; returns each tile's loss, fills W and the dots with `want_grad`."""
    student, teacher, tile, plan = latents.student, latents.teacher, layout.gram, layout.plan()
    assert teacher is not None
    num_rows, width = student.shape
    losses = torch.empty(len(tiles), dtype=torch.float32, device=student.device)
    gram_forward[(len(tiles),)](
        student, teacher, latents.r_student, latents.r_teacher, w, losses, dots, tiles, plan.starts,
        plan.lengths, wave.w_starts, num_rows, width, student.stride(0), teacher.stride(0),
        BLOCK=tile.rows, DEPTH=tile.depth, CLIP=clip, WANT_GRAD=want_grad,
        MIRROR=wave.is_whole or not want_grad, EVEN=width % tile.depth == 0,
        PRECISION=dot_precision(student.dtype), num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    return losses


def _launch_gradient(
    latents: _Latents, w: Tensor, dots: Tensor, wave: waves.Wave, layout: _Layout, grad: Tensor, out: Tensor
) -> None:
    """The rows of the student's gradient that a wave's W gives."""
    student, tile, plan = latents.student, layout.gradient, layout.plan()
    num_rows, width = student.shape
    gram_backward[(cdiv(width, tile.columns), len(wave.gradient_tiles))](
        w, student, latents.r_student, dots, grad, out, wave.gradient_tiles, plan.starts, plan.lengths,
        wave.w_starts, num_rows, width, student.stride(0), out.stride(0),
        ROWS=tile.rows, COLUMNS=tile.columns, DEPTH=tile.depth, DOTS_BLOCK=layout.gram.rows,
        EVEN=width % tile.columns == 0, WIDE=w.dtype != student.dtype,
        PRECISION=dot_precision(w.dtype), num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip


@forward_op.register_fake
def _(student_NK, teacher_NK, lengths, clip, want_grad):
    layout = _Layout.of(student_NK, lengths)
    num_rows = student_NK.shape[0]
    fp32 = {"dtype": torch.float32}
    return (
        student_NK.new_empty((), **fp32),
        student_NK.new_empty(want_grad * layout.kept_elements(), dtype=layout.w_dtype),
        student_NK.new_empty(_dots_shape(layout, num_rows, want_grad), **fp32),
        student_NK.new_empty(num_rows, **fp32),
        student_NK.new_empty(num_rows, **fp32),
    )


@torch.library.custom_op("laver_kernels::gram_loss_backward", mutates_args=())
def backward_op(
    grad: Tensor,
    student_NK: Tensor,
    teacher_NK: Tensor | None,
    w: Tensor,
    dots: Tensor,
    r_student: Tensor,
    r_teacher: Tensor,
    lengths: list[int],
    clip: bool,
) -> Tensor:
    """Gradient of the student, `[N, K]` in its dtype; the teacher is there where some W is made again."""
    layout = _Layout.of(student_NK, lengths)
    plan = layout.plan()
    student = inner_contiguous(student_NK)
    teacher = None if teacher_NK is None else inner_contiguous(teacher_NK)
    latents = _Latents(student=student, teacher=teacher, r_student=r_student, r_teacher=r_teacher)
    grad = grad.float().contiguous()
    dstudent = torch.empty(student_NK.shape, dtype=student.dtype, device=student.device)
    others = plan.waves[plan.num_kept :]
    with on_device_of(student):
        for wave in plan.waves[: plan.num_kept]:
            _launch_gradient(latents, w, dots, wave, layout, grad, dstudent)
        if others:
            w = torch.empty(max(wave.w_elements for wave in others), dtype=w.dtype, device=w.device)
            dots = dots.new_empty(layout.num_blocks, len(student))
        for wave in others:
            _launch_gram(latents, w, dots, wave.gram_tiles, wave, layout, clip, True)
            _launch_gradient(latents, w, dots, wave, layout, grad, dstudent)
    return dstudent


@backward_op.register_fake
def _(grad, student_NK, teacher_NK, w, dots, r_student, r_teacher, lengths, clip):
    return student_NK.new_empty(student_NK.shape)


def _save_for_backward(ctx, inputs, output) -> None:
    student_NK, teacher_NK, lengths, clip, _ = inputs
    _, w, dots, r_student, r_teacher = output
    ctx.mark_non_differentiable(w, dots, r_student, r_teacher)
    ctx.set_materialize_grads(False)
    found = _Layout.of(student_NK, lengths).split()
    is_needed = len(found) > waves.num_kept(found)
    ctx.save_for_backward(student_NK, teacher_NK if is_needed else None, w, dots, r_student, r_teacher)
    ctx.lengths, ctx.clip = lengths, clip


def _backward(ctx, grad, *_):
    if grad is None:
        return (None,) * 5
    return backward_op(grad, *ctx.saved_tensors, ctx.lengths, ctx.clip), None, None, None, None


forward_op.register_autograd(_backward, setup_context=_save_for_backward)
