"""Masked latent reconstruction (MIM): the student's masked tokens against the teacher's sight of them."""

import torch

from laver_kernels import latent_cross_entropy


def latent_sum(
    student_NK: torch.Tensor,
    teacher_NK: torch.Tensor,
    masked_rows_M: torch.Tensor,
    *,
    center_K: torch.Tensor | None,
    student_temperature: float,
    teacher_temperature: float,
    impl: str = "auto",
) -> torch.Tensor:
    """Sum over masked tokens of -softmax((teacher - center) / t_t) . log_softmax(student / t_s), fp32 scalar.

    Source: LaVer (arXiv 2512.06281), equation of L_MIM; centring as in its released code.
    """
    return latent_cross_entropy(
        student_NK,
        teacher_NK,
        masked_rows_M,
        center_K=center_K,
        student_temperature=student_temperature,
        teacher_temperature=teacher_temperature,
        impl=impl,  # type: ignore[arg-type]
    )
