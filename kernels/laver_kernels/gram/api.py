"""Gram loss: a student's visual tokens no more alike than the teacher's (LaVer, arXiv 2512.06281)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from laver_kernels.backend import Impl, choose
from laver_kernels.checks import want_tensor
from laver_kernels.gram import reference

NAME = "gram_loss"


def gram_loss(
    student_NK: Tensor,
    teacher_NK: Tensor,
    image_lengths: Sequence[int],
    *,
    clip: bool = True,
    impl: Impl = "auto",
) -> Tensor:
    """Sum over images of `||R||_F^2 / n^2`, a scalar in fp32 (fp64 for fp64 inputs).

    Rows of `student_NK` and `teacher_NK` are the tokens of the images after one another, `image_lengths[i]`
    of them each (host integers, zeros allowed). `R = max(0, G_s - G_t)` with `clip` (clipped Gram anchoring),
    `G_s - G_t` without; `G` is the cosine of every pair of rows. The teacher gets no gradient.

    Raises:
        ValueError: shapes, dtypes or devices that differ, or lengths that do not sum to N.
    """
    want_tensor(NAME, "student_NK", student_NK, ("N", "K"))
    want_tensor(
        NAME,
        "teacher_NK",
        teacher_NK,
        tuple(student_NK.shape),
        dtypes=(student_NK.dtype,),
        device=student_NK.device,
    )
    lengths = _lengths(image_lengths, student_NK.shape[0])
    backend = choose(impl, student_NK, NAME)
    with torch.autocast(student_NK.device.type, enabled=False):
        if student_NK.numel() == 0:
            return student_NK.to(torch.promote_types(student_NK.dtype, torch.float32)).sum()
        if backend == "triton":
            from laver_kernels.gram import triton

            return triton.gram_loss(student_NK, teacher_NK, lengths, clip)
        return reference.gram_loss(student_NK, teacher_NK, lengths, clip)


def _lengths(image_lengths: Sequence[int], num_rows: int) -> tuple[int, ...]:
    if isinstance(image_lengths, Tensor):
        raise ValueError(
            f"{NAME}: image_lengths is a tensor, want host integers (reading it would wait for the GPU)"
        )
    lengths = tuple(image_lengths)
    if not all(isinstance(length, int) and length >= 0 for length in lengths) or sum(lengths) != num_rows:
        raise ValueError(
            f"{NAME}: image_lengths={lengths}, want non-negative integers that sum to N={num_rows}"
        )
    return lengths
