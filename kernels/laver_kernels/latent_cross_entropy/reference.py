"""Latent cross-entropy in plain PyTorch: the specification.

loss = - sum over masked rows of softmax((teacher - centre) / tau_t) . log_softmax(student / tau_s)
(LaVer, arXiv 2512.06281: masked image modelling in the LLM's latent space; centring as in DINO).
"""

import torch
from torch import Tensor


def latent_cross_entropy(
    student_NK: Tensor,
    teacher_NK: Tensor,
    rows_M: Tensor,
    center_K: Tensor | None,
    student_temperature: float,
    teacher_temperature: float,
) -> Tensor:
    """The operation of `api.latent_cross_entropy`, computed in fp32 (fp64 for fp64 inputs)."""
    wide = torch.promote_types(student_NK.dtype, torch.float32)
    student_MK = student_NK.index_select(0, rows_M).to(wide)
    teacher_MK = teacher_NK.detach().index_select(0, rows_M).to(wide)
    if center_K is not None:
        teacher_MK = teacher_MK - center_K.detach().to(wide)
    target_MK = torch.softmax(teacher_MK / teacher_temperature, dim=-1)
    return -(target_MK * torch.log_softmax(student_MK / student_temperature, dim=-1)).sum()
