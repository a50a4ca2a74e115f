"""Latent cross-entropy over masked visual tokens (LaVer, arXiv 2512.06281)."""

import torch
from torch import Tensor

from laver_kernels.backend import Impl, choose
from laver_kernels.checks import can_read, want_tensor
from laver_kernels.latent_cross_entropy import reference

NAME = "latent_cross_entropy"


def latent_cross_entropy(
    student_NK: Tensor,
    teacher_NK: Tensor,
    rows_M: Tensor,
    *,
    center_K: Tensor | None = None,
    student_temperature: float = 0.1,
    teacher_temperature: float = 0.04,
    impl: Impl = "auto",
) -> Tensor:
    """Sum over the rows in `rows_M` of the cross-entropy from teacher to student, a scalar in fp32 (or fp64).

    `student_NK` and `teacher_NK` are logits; `rows_M` int64, distinct row indices (the masked tokens);
    `center_K` is subtracted from the teacher's logits. Only the student gets a gradient, zero outside
    `rows_M`.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, a temperature that is not positive, and for CPU
            tensors a row out of range or given twice.
    """
    want_tensor(NAME, "student_NK", student_NK, ("N", "K"))
    num_rows, width = student_NK.shape
    device = student_NK.device
    want_tensor(NAME, "teacher_NK", teacher_NK, (num_rows, width), device=device)
    want_tensor(NAME, "rows_M", rows_M, ("M",), (torch.int64,), device)
    if center_K is not None:
        want_tensor(NAME, "center_K", center_K, (width,), device=device)
    if not (student_temperature > 0 and teacher_temperature > 0):
        raise ValueError(
            f"{NAME}: temperatures student={student_temperature}, teacher={teacher_temperature}, want > 0"
        )
    if can_read(rows_M):
        _check_rows(rows_M, num_rows)
    backend = choose(impl, student_NK, NAME)
    with torch.autocast(device.type, enabled=False):
        if rows_M.shape[0] == 0 or width == 0:
            return student_NK[:0].to(torch.promote_types(student_NK.dtype, torch.float32)).sum()
        if backend == "triton":
            from laver_kernels.latent_cross_entropy import triton

            return triton.latent_cross_entropy(
                student_NK, teacher_NK, rows_M, center_K, student_temperature, teacher_temperature
            )
        return reference.latent_cross_entropy(
            student_NK, teacher_NK, rows_M, center_K, student_temperature, teacher_temperature
        )


def _check_rows(rows_M: Tensor, num_rows: int) -> None:
    if rows_M.numel() == 0:
        return
    low, high = int(rows_M.min()), int(rows_M.max())
    if low < 0 or high >= num_rows:
        raise ValueError(f"{NAME}: rows_M reaches [{low}, {high}], want within [0, {num_rows})")
    if rows_M.unique().numel() != rows_M.numel():
        raise ValueError(f"{NAME}: rows_M gives a row twice, want distinct rows")
