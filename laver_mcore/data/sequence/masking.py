"""Which visual tokens of an image are replaced by the mask token (LaVer, arXiv 2512.06281)."""

import math
from typing import Literal

import numpy as np

from laver_mcore.data.randomness import permutation, random_bits

MaskStrategy = Literal["permutation", "bernoulli"]


def draw_mask(
    num_tokens: int,
    ratio: float,
    *,
    strategy: MaskStrategy = "permutation",
    seed: int,
    key: str,
    step: int,
    image_index: int,
) -> np.ndarray:
    """Draw the mask of one image: bool [num_tokens], True where the token is replaced.

    `permutation` replaces exactly `floor(ratio * num_tokens)` tokens, `bernoulli` each one with probability
    `ratio`. The draw depends on (seed, key, image_index, step) alone, so that every parallel layout masks
    the same tokens; a larger ratio masks a superset.
    """
    if not 0.0 <= ratio <= 1.0:
        raise ValueError(f"mask ratio is {ratio}; it must lie in [0, 1]")
    names = ("mask", seed, key, image_index, step)
    if strategy == "permutation":
        mask = np.zeros(num_tokens, dtype=bool)
        mask[permutation(num_tokens, *names)[: math.floor(ratio * num_tokens)]] = True
        return mask
    if strategy == "bernoulli":
        return (random_bits(num_tokens, *names) >> np.uint64(11)) * 2.0**-53 < ratio
    raise ValueError(f"mask strategy is {strategy!r}; use 'permutation' or 'bernoulli'")
