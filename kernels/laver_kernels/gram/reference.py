"""Gram loss in plain PyTorch: the specification.

loss = sum over images of ||R||_F^2 / n^2, R = max(0, G_s - G_t) when clipped, else G_s - G_t, where
G = Z_n Z_n^T over the L2-normalised rows of one image (LaVer, arXiv 2512.06281, clipped Gram anchoring).
A row of zeros stays zero. The diagonal, 1 - 1, is zero by definition. B images of equal length run at once.
"""

import itertools

import torch
from torch import Tensor

SMALLEST_NORM = 1e-12  # below it a row counts as zero


def gram_loss(student_NK: Tensor, teacher_NK: Tensor, image_lengths: tuple[int, ...], clip: bool) -> Tensor:
    """The operation of `api.gram_loss`, computed in fp32 (fp64 for fp64 inputs)."""
    wide = torch.promote_types(student_NK.dtype, torch.float32)
    student, teacher = normalised(student_NK.to(wide)), normalised(teacher_NK.detach().to(wide))
    loss = student[:0].sum()
    start = 0
    for length, run in itertools.groupby(image_lengths):
        count = len(list(run))
        end = start + count * length
        if length:
            student_BNK = student[start:end].view(count, length, -1)
            teacher_BNK = teacher[start:end].view(count, length, -1)
            excess_BNN = student_BNK @ student_BNK.mT - teacher_BNK @ teacher_BNK.mT
            if clip:
                excess_BNN = excess_BNN.clamp(min=0)
            on_diagonal = torch.eye(length, dtype=torch.bool, device=student.device)
            loss = loss + excess_BNN.masked_fill(on_diagonal, 0).square().sum() / length**2
        start = end
    return loss


def normalised(z_NK: Tensor) -> Tensor:
    """Rows divided by their L2 norm; a zero row stays zero and gets no gradient."""
    norm_N1 = torch.linalg.vector_norm(z_NK, dim=-1, keepdim=True)
    is_zero = norm_N1 < SMALLEST_NORM
    return torch.where(is_zero, 0.0, z_NK / torch.where(is_zero, 1.0, norm_N1))
