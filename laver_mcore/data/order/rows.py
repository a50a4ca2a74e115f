"""Which samples stand in which row: a pure function of (seed, row), for one set or a weighted mixture.

Epochs follow each other without end; an epoch is a permutation of its samples, packed into rows of at most
seq_length tokens, which are permuted again (packing sorts, and steps must not), neighbours alike in cost. A set of
weight w takes part in an epoch with w times its size: epoch e takes positions [e w n, (e + 1) w n) of the endless
concatenation of the set's own permutations, so over the epochs every sample of a set is seen equally often.
"""

import bisect
import itertools
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from laver_mcore.data.errors import DataError
from laver_mcore.data.order.packing import pack
from laver_mcore.data.randomness import permutation, random_bits

_KEPT_EPOCHS = 2  # a step may straddle two
_ALIKE = 512  # rows among which neighbours become alike, a power of two


@dataclass(frozen=True, eq=False)
class _Rows:
    """Rows of an epoch: row r holds `members[starts[r] : starts[r + 1]]`."""

    members: np.ndarray
    starts: np.ndarray

    def __len__(self) -> int:
        return len(self.starts) - 1


class RowOrder:
    """Rows of the endless concatenation of epochs; safe to ask from several threads."""

    def __init__(
        self,
        lengths: np.ndarray,
        *,
        seq_length: int,
        seed: int,
        window: int = 1024,
        set_starts: Sequence[int] | np.ndarray | None = None,
        weights: Sequence[float] | None = None,
        costs: np.ndarray | None = None,
    ) -> None:
        self._lengths, self._seq_length, self._seed, self._window = lengths, seq_length, seed, window
        self._costs, self._paid = costs, lengths if costs is None else lengths + costs
        starts = [0, len(lengths)] if set_starts is None else [int(start) for start in set_starts]
        self._sets = list(itertools.pairwise(starts))
        if weights is not None and len(weights) != len(self._sets):
            raise DataError(f"{len(weights)} weights for {len(self._sets)} data sets; give one for each")
        if weights is not None and (min(weights) < 0 or max(weights) == 0):
            raise DataError(f"weights {tuple(weights)} must not be negative, nor all 0")
        # As written, not as rounded to binary: 0.1 of 30 samples is 3.
        self._weights = [Fraction(str(weight)) for weight in weights or [1] * len(self._sets)]
        self._lock = threading.Lock()
        self._epochs: dict[int, _Rows] = {}
        self._first_row = [0]  # first row of epoch 0, 1, ... as far as known

    def rows_per_epoch(self, epoch: int) -> int:
        """Packed rows in an epoch; it varies a little, because every epoch is packed anew."""
        with self._lock:
            return len(self._rows(epoch))

    def samples_per_epoch(self, epoch: int) -> int:
        """Samples in an epoch; with weights, some of them more than once."""
        with self._lock:
            return len(self._rows(epoch).members)

    def row(self, index: int) -> list[int]:
        """The samples (numbers) of row `index`."""
        with self._lock:
            while index >= self._first_row[-1]:
                epoch = len(self._first_row) - 1
                self._first_row.append(self._first_row[-1] + len(self._rows(epoch)))
            epoch = bisect.bisect_right(self._first_row, index) - 1
            rows, number = self._rows(epoch), index - self._first_row[epoch]
            return rows.members[rows.starts[number] : rows.starts[number + 1]].tolist()

    def row_cost(self, index: int) -> int:
        """What row `index` costs, in tokens' worth of the decoder's matrices; its length without `costs`."""
        return int(self._paid[self.row(index)].sum())

    def samples_of(self, epoch: int) -> np.ndarray:
        """The samples (numbers) of an epoch in the order in which they are packed."""
        chosen = np.sort(np.concatenate([self._of_set(number, epoch) for number in range(len(self._sets))]))
        return chosen[permutation(len(chosen), "epoch", self._seed, epoch)]

    def _of_set(self, number: int, epoch: int) -> np.ndarray:
        start, stop = self._sets[number]
        size, weight = stop - start, self._weights[number]
        if weight == 1 or not size:
            return np.arange(start, stop)
        first, last = int(epoch * weight * size), int((epoch + 1) * weight * size)
        parts = [np.empty(0, dtype=np.int64)]
        for cycle in range(first // size, (last + size - 1) // size):
            order = permutation(size, "set", self._seed, number, cycle)
            parts.append(order[max(first - cycle * size, 0) : last - cycle * size])
        return start + np.concatenate(parts)

    def _rows(self, epoch: int) -> _Rows:
        if epoch not in self._epochs:
            order = self.samples_of(epoch)
            costs = None if self._costs is None else self._costs[order]
            bins = pack(self._lengths[order], self._seq_length, window=self._window, costs=costs)
            if not bins:
                raise DataError(
                    f"epoch {epoch} holds no sample: the weights are too small for so few samples"
                )
            places = permutation(len(bins), "rows", self._seed, epoch)
            if costs is not None:
                paid = self._paid[order]
                row_costs = np.array([paid[bins[place]].sum() for place in places])
                places = places[neighbours_alike(row_costs, "alike", self._seed, epoch)]
            shuffled = [bins[place] for place in places]
            while len(self._epochs) >= _KEPT_EPOCHS:
                del self._epochs[next(iter(self._epochs))]
            self._epochs[epoch] = _Rows(
                members=order[np.concatenate(shuffled)],
                starts=np.cumsum([0, *map(len, shuffled)]),
            )
        return self._epochs[epoch]


def neighbours_alike(costs: np.ndarray, *names: str | int) -> np.ndarray:
    """A random order of rows in which each 2, 4, ... `_ALIKE` rows from a multiple on cost about the same.

    So do the ranks of a step then, even with one row each. Of `_ALIKE` rows in ascending cost the halves change
    places or not, then the halves of each half, and so on.
    """
    order = np.empty_like(costs)
    for start in range(0, costs.size, _ALIKE):
        part = costs[start : start + _ALIKE]
        ranks = np.empty(part.size, dtype=np.int64)
        ranks[np.argsort(part, kind="stable")] = np.arange(part.size)
        changes = (random_bits(_ALIKE, *names, start) >> np.uint64(63)).astype(np.int64)
        places = np.zeros_like(ranks)
        for level in range(_ALIKE.bit_length() - 1):  # of a binary tree, whose nodes are counted as in a heap
            node = (_ALIKE + ranks) >> (level + 1)
            places |= ((ranks >> level & 1) ^ changes[node]) << level
        order[start : start + _ALIKE] = start + np.argsort(places)
    return order
