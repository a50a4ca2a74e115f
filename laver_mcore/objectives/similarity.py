"""Homogenisation of visual tokens, a diagnostic: how alike the tokens of one image have become."""

import numpy as np
import torch
import torch.nn.functional as F

from laver_mcore.device import send


@torch.no_grad()
def similarity_sum(visual_ND: torch.Tensor, image_lengths: tuple[int, ...]) -> torch.Tensor:
    """Sum over images of two or more tokens of the mean cosine between different tokens, fp32 scalar.

    Linear in N: the sum over all pairs of unit vectors is the squared norm of their sum.
    """
    unit_ND = F.normalize(visual_ND.float(), dim=-1)
    lengths = np.asarray(image_lengths, dtype=np.int64)
    image_N = send(torch.from_numpy(np.repeat(np.arange(len(lengths)), lengths)), unit_ND.device)
    sums_ID = unit_ND.new_zeros(len(lengths), unit_ND.shape[1]).index_add(0, image_N, unit_ND)
    count_I = send(torch.from_numpy(lengths).float(), unit_ND.device)
    pairs_I = (count_I * (count_I - 1)).clamp(min=1)
    mean_I = (sums_ID.square().sum(-1) - count_I) / pairs_I
    return torch.where(count_I > 1, mean_I, 0.0).sum()


def num_similar_images(image_lengths: tuple[int, ...]) -> int:
    """How many images `similarity_sum` counts."""
    return sum(n > 1 for n in image_lengths)
