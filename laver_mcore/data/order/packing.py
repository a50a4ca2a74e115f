"""Samples of many lengths into rows of one length, without cutting any; even in cost where costs are given."""

from collections.abc import Sequence

import numpy as np

from laver_mcore.data.errors import DataError

_EXTRA_ROWS = 0.02  # what evenness may take, beyond the rows of first-fit-decreasing


def pack(
    lengths: Sequence[int] | np.ndarray,
    capacity: int,
    *,
    window: int = 1024,
    costs: np.ndarray | None = None,
) -> list[list[int]]:
    """Pack samples into bins of at most `capacity` tokens; a bin is a list of indices into `lengths`.

    Within each look-ahead window of `window` consecutive samples: a window is closed before the next one opens,
    so a sample never moves further than that. First-fit-decreasing, which fills best and puts samples of one
    length together; with `costs` (int64, one a sample) each goes to the cheapest bin that it fits into, which
    spreads them. Deterministic; every sample lands in exactly one bin, in ascending order within it.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    if lengths.size and lengths.max() > capacity:
        raise DataError(f"sample {lengths.argmax()} has {lengths.max()} tokens; a row holds {capacity}")
    bins: list[list[int]] = []
    for start in range(0, lengths.size, window):
        part = lengths[start : start + window]
        found = _first_fit_decreasing(part, capacity)
        if costs is not None:
            found = _even(part, capacity, costs[start : start + window], found)
        bins.extend([start + index for index in sorted(members)] for members in found)
    return bins


def _first_fit_decreasing(lengths: np.ndarray, capacity: int) -> list[list[int]]:
    free = np.full(lengths.size, capacity)  # at most one bin per sample
    bins: list[list[int]] = []
    for index in np.argsort(-lengths, kind="stable"):
        # An unopened bin has the full capacity, so the first that fits is an open one or the next new one.
        first = int(np.argmax(free >= lengths[index]))
        if first == len(bins):
            bins.append([])
        bins[first].append(int(index))
        free[first] -= lengths[index]
    return bins


def _even(lengths: np.ndarray, capacity: int, costs: np.ndarray, fullest: list[list[int]]) -> list[list[int]]:
    """The evenest packing that needs few rows more than `fullest`.

    Placing the dearest samples first makes the evenest rows, the longest first the fullest; the longer a row is in
    samples, the less the difference between the two.
    """
    for order in (costs, lengths + costs, lengths):
        bins = _cheapest_first(lengths, capacity, costs, np.argsort(-order, kind="stable"), len(fullest))
        if len(bins) <= len(fullest) * (1 + _EXTRA_ROWS):
            return bins
    return fullest


def _cheapest_first(
    lengths: np.ndarray, capacity: int, costs: np.ndarray, order: np.ndarray, num_bins: int
) -> list[list[int]]:
    """Each sample, in `order`, into the cheapest of at first `num_bins` bins that it fits into."""
    free = np.full(lengths.size, capacity)
    load = np.zeros(lengths.size, dtype=np.int64)
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    never = np.iinfo(np.int64).max
    for index in order:
        opened = len(bins)
        loads = np.where(free[:opened] >= lengths[index], load[:opened], never)
        cheapest = int(loads.argmin())
        if loads[cheapest] == never:
            cheapest = opened
            bins.append([])
        bins[cheapest].append(int(index))
        free[cheapest] -= lengths[index]
        load[cheapest] += costs[index]
    return [members for members in bins if members]
