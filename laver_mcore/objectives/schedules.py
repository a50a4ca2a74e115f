"""Schedules of the objectives: pure functions of the iteration, which counts from 0.

Source: LaVer (arXiv 2512.06281), section 3 and its released schedules.
"""

import math
from collections.abc import Sequence
from typing import Literal

CONSTANT_MASK_START = 0.125
"""Share of the run during which the constant strategy does not mask yet."""
Strategy = Literal["cosine", "constant"]


def mask_ratio(final: float, strategy: Strategy, iteration: int, train_iters: int) -> float:
    """Share of visual tokens masked at `iteration`: cosine 0 -> `final`, or `final` after an eighth of the run."""
    progress = iteration / train_iters
    if strategy == "cosine":
        return final * (1.0 - math.cos(math.pi * progress)) / 2.0
    return 0.0 if progress < CONSTANT_MASK_START else final


def masked_over_run(counts: Sequence[int]) -> tuple[float, int | None]:
    """(mean masked tokens an image, first iteration that masks any, from 0) of a run's numbers of masked tokens."""
    first = next((iteration for iteration, count in enumerate(counts) if count), None)
    return sum(counts) / len(counts), first


def momentum(first: float, strategy: Strategy, iteration: int, train_iters: int) -> float:
    """EMA momentum at `iteration`: cosine `first` -> 1, or `first` throughout."""
    if strategy == "constant":
        return first
    return 1.0 - (1.0 - first) * (1.0 + math.cos(math.pi * iteration / train_iters)) / 2.0
