"""Gram loss: visual tokens may not grow more alike than the teacher's (CGA), or must be as alike (GA)."""

import torch

from laver_kernels import gram_loss


def gram_sum(
    student_NK: torch.Tensor,
    teacher_NK: torch.Tensor,
    image_lengths: tuple[int, ...],
    *,
    gram: str,
    gram_scope: str,
    impl: str = "auto",
) -> torch.Tensor:
    """Sum over images of ||max(0, G(student) - G(teacher))||_F^2 / N^2 (clipped), fp32 scalar.

    `gram` "ga" is the symmetric difference of the released code. With `gram_scope` "micro_batch" all visual tokens
    of the micro-batch form one matrix, which counts as one image. Source: LaVer (arXiv 2512.06281), L_CGA.
    """
    lengths = (sum(image_lengths),) if gram_scope == "micro_batch" else image_lengths
    return gram_loss(student_NK, teacher_NK, lengths, clip=gram == "cga", impl=impl)  # type: ignore[arg-type]


def num_gram_matrices(image_lengths: tuple[int, ...], gram_scope: str) -> int:
    """How many matrices `gram_sum` sums over: the local part of its global divisor."""
    return min(1, len(image_lengths)) if gram_scope == "micro_batch" else len(image_lengths)
