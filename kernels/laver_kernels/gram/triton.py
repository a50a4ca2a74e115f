"""Gram loss on Triton: registered forward and backward operators, and the tile lists they walk."""

import functools
from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from laver_kernels.configs import architecture, gram_tile
from laver_kernels.gram.kernels import gram_backward, gram_forward, inverse_norms
from laver_kernels.launch import dot_precision, inner_contiguous, on_device_of, want_kernel_dtype


def gram_loss(student_NK: Tensor, teacher_NK: Tensor, lengths: tuple[int, ...], clip: bool) -> Tensor:
    """The operation of `api.gram_loss` for fp16, bf16 and fp32."""
    want_kernel_dtype("gram_loss", student_NK)
    want_grad = student_NK.requires_grad and torch.is_grad_enabled()
    loss, *_ = forward_op(student_NK, teacher_NK.detach(), list(lengths), clip, want_grad)
    return loss


@functools.lru_cache(maxsize=64)
def tile_lists(lengths: tuple[int, ...], block: int, rows: int, device: torch.device) -> tuple[Tensor, ...]:
    """Tiles (image, i, j), i <= j, of the forward, (image, i) of the backward; first row, length, W's start.

    Remembered, since fixed-resolution images repeat. Rows of W are padded to 16 bytes.
    """
    forward, backward, starts, w_starts = [], [], [], []
    start = w_start = 0
    for image, length in enumerate(lengths):
        num_blocks = triton.cdiv(length, block)
        forward += [(image, i, j) for i in range(num_blocks) for j in range(i, num_blocks)]
        backward += [(image, i) for i in range(triton.cdiv(length, rows))]
        starts.append(start)
        w_starts.append(w_start)
        start += length
        w_start += _w_elements(length)
    int32, int64 = torch.int32, torch.int64
    lists = ((forward, int32), (backward, int32), (starts, int32), (lengths, int32), (w_starts, int64))
    return tuple(_on_device(values, dtype, device) for values, dtype in lists)


def _on_device(values: Sequence, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Through pinned memory on a GPU: a copy from pageable memory may wait for the stream."""
    tensor = torch.tensor(values, dtype=dtype)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def _w_elements(length: int) -> int:
    """Elements of one image's W: rows padded to 8, the whole to 16, so that every row starts on 16 bytes."""
    return triton.cdiv(length * triton.cdiv(length, 8) * 8, 16) * 16


def _sizes(lengths: list[int], block: int) -> tuple[int, int]:
    """Elements of W over all images, and the most tiles along one side of an image."""
    return sum(map(_w_elements, lengths)), max(triton.cdiv(n, block) for n in lengths)


def _w_dtype(dtype: torch.dtype) -> torch.dtype:
    # W = R / (||z_i|| ||z_j||) is about 1e-6 for a 3584-wide latent: too small for fp16.
    return torch.float32 if dtype == torch.float16 else dtype


@torch.library.custom_op("laver_kernels::gram_loss", mutates_args=())
def forward_op(
    student_NK: Tensor, teacher_NK: Tensor, lengths: list[int], clip: bool, want_grad: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss, and for the backward W, the row dots and the inverse norms (empty unless `want_grad`)."""
    num_rows, width = student_NK.shape
    student, teacher = inner_contiguous(student_NK), inner_contiguous(teacher_NK)
    tile = gram_tile("forward", architecture(student.device), student.dtype)
    back = gram_tile("backward", architecture(student.device), student.dtype)
    tiles, _, starts, counts, w_starts = tile_lists(tuple(lengths), tile.rows, back.rows, student.device)
    w_size, num_blocks = _sizes(lengths, tile.rows)
    keep = int(want_grad)
    w = torch.empty(keep * w_size, dtype=_w_dtype(student.dtype), device=student.device)
    dots = torch.empty(keep * num_blocks, num_rows, dtype=torch.float32, device=student.device)
    r_student, r_teacher = (
        torch.empty(num_rows, dtype=torch.float32, device=student.device) for _ in range(2)
    )
    partial = torch.empty(len(tiles), dtype=torch.float32, device=student.device)
    with on_device_of(student):
        inverse_norms[(num_rows,)](
            student, teacher, r_student, r_teacher, width, student.stride(0), teacher.stride(0),
            WIDTH_STEP=min(2048, triton.next_power_of_2(width)),
        )  # fmt: skip
        gram_forward[(len(tiles),)](
            student, teacher, r_student, r_teacher, w, partial, dots, tiles, starts, counts, w_starts,
            num_rows, width, student.stride(0), teacher.stride(0),
            BLOCK=tile.rows, DEPTH=tile.depth, CLIP=clip, WANT_GRAD=want_grad, EVEN=width % tile.depth == 0,
            PRECISION=dot_precision(student.dtype), num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip
    return partial.sum(), w, dots, r_student


@forward_op.register_fake
def _(student_NK, teacher_NK, lengths, clip, want_grad):
    arch = architecture(student_NK.device)
    w_size, num_blocks = _sizes(lengths, gram_tile("forward", arch, student_NK.dtype).rows)
    keep = int(want_grad)
    fp32 = {"dtype": torch.float32}
    return (
        student_NK.new_empty((), **fp32),
        student_NK.new_empty(keep * w_size, dtype=_w_dtype(student_NK.dtype)),
        student_NK.new_empty((keep * num_blocks, student_NK.shape[0]), **fp32),
        student_NK.new_empty(student_NK.shape[0], **fp32),
    )


@torch.library.custom_op("laver_kernels::gram_loss_backward", mutates_args=())
def backward_op(
    grad: Tensor, student_NK: Tensor, w: Tensor, dots: Tensor, r_student: Tensor, lengths: list[int]
) -> Tensor:
    """Gradient of the student, `[N, K]` in its dtype."""
    num_rows, width = student_NK.shape
    student = inner_contiguous(student_NK)
    arch = architecture(student.device)
    forward, tile = gram_tile("forward", arch, student.dtype), gram_tile("backward", arch, student.dtype)
    lists = tile_lists(tuple(lengths), forward.rows, tile.rows, student.device)
    _, tiles, starts, counts, w_starts = lists
    dstudent = torch.empty(student_NK.shape, dtype=student.dtype, device=student.device)
    with on_device_of(student):
        gram_backward[(triton.cdiv(width, tile.columns), len(tiles))](
            w, student, r_student, dots, grad.float().contiguous(), dstudent, tiles, starts, counts, w_starts,
            num_rows, width, student.stride(0), dstudent.stride(0),
            ROWS=tile.rows, COLUMNS=tile.columns, DEPTH=tile.depth, DOTS_BLOCK=forward.rows,
            EVEN=width % tile.columns == 0, WIDE=w.dtype != student.dtype,
            PRECISION=dot_precision(student.dtype), num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip
    return dstudent


@backward_op.register_fake
def _(grad, student_NK, w, dots, r_student, lengths):
    return student_NK.new_empty(student_NK.shape)


def _save_for_backward(ctx, inputs, output) -> None:
    student_NK, _, lengths, _, _ = inputs
    _, w, dots, r_student = output
    ctx.mark_non_differentiable(w, dots, r_student)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(student_NK, w, dots, r_student)
    ctx.lengths = lengths


def _backward(ctx, grad, *_):
    if grad is None:
        return (None,) * 5
    return backward_op(grad, *ctx.saved_tensors, ctx.lengths), None, None, None, None


forward_op.register_autograd(_backward, setup_context=_save_for_backward)
