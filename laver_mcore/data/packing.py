"""Samples of many lengths into rows of one length, without cutting any."""

from collections.abc import Sequence

import numpy as np

from laver_mcore.data.errors import DataError


def pack(lengths: Sequence[int] | np.ndarray, capacity: int, *, window: int = 1024) -> list[list[int]]:
    """Pack samples into bins of at most `capacity` tokens; a bin is a list of indices into `lengths`.

    First-fit-decreasing within each look-ahead window of `window` consecutive samples: a window is closed
    before the next one opens, so a sample never moves further than that. Deterministic; every sample lands
    in exactly one bin, in ascending order within it.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    if lengths.size and lengths.max() > capacity:
        raise DataError(f"sample {lengths.argmax()} has {lengths.max()} tokens; a row holds {capacity}")
    bins: list[list[int]] = []
    for start in range(0, lengths.size, window):
        bins.extend(_first_fit_decreasing(lengths[start : start + window], capacity, start))
    return bins


def _first_fit_decreasing(lengths: np.ndarray, capacity: int, offset: int) -> list[list[int]]:
    free = np.full(lengths.size, capacity)  # at most one bin per sample
    bins: list[list[int]] = []
    for index in np.argsort(-lengths, kind="stable"):
        # An unopened bin has the full capacity, so the first that fits is an open one or the next new one.
        first = int(np.argmax(free >= lengths[index]))
        if first == len(bins):
            bins.append([])
        bins[first].append(offset + int(index))
        free[first] -= lengths[index]
    return [sorted(members) for members in bins]
