"""Fused operations for latent visual reconstruction (LaVer, arXiv 2512.06281).

Shape legend: T tokens of a packed sequence, H query heads, G key/value heads, D head dimension,
F = D/2 rotation frequencies, N visual tokens (or supervised rows), K latent width, M masked rows,
V vocabulary columns of this rank.

Every operation has a plain PyTorch `reference`, which is its specification, and a Triton backend that is
imported only when it is used: this package works with torch alone.
"""

from laver_kernels.ema.api import ema_update_
from laver_kernels.gram.api import gram_loss
from laver_kernels.latent_cross_entropy.api import latent_cross_entropy
from laver_kernels.linear_cross_entropy.api import linear_cross_entropy
from laver_kernels.mixed_attention.api import mixed_attention
from laver_kernels.mixed_attention.intervals import Intervals
from laver_kernels.mixed_attention.merge import merge_attention
from laver_kernels.mixed_attention.rope import rope_table, rotate

__all__ = [
    "Intervals",
    "ema_update_",
    "gram_loss",
    "latent_cross_entropy",
    "linear_cross_entropy",
    "merge_attention",
    "mixed_attention",
    "rope_table",
    "rotate",
]
