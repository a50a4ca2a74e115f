"""Packing: every sample once, no row over capacity, the same rows every time."""

import numpy as np
import pytest

from laver_mcore.data.errors import DataError
from laver_mcore.data.packing import pack


@pytest.mark.parametrize("trial", range(30))
def test_every_sample_once_and_no_bin_over_capacity(trial):
    draw = np.random.default_rng(trial)
    capacity = int(draw.integers(1, 200))
    lengths = draw.integers(1, capacity + 1, int(draw.integers(0, 400)))
    window = int(draw.integers(1, 500))
    bins = pack(lengths, capacity, window=window)
    assert sorted(index for members in bins for index in members) == list(range(len(lengths)))
    for members in bins:
        assert 0 < sum(lengths[index] for index in members) <= capacity
        assert members == sorted(members)
        assert members[0] // window == members[-1] // window
    assert pack(lengths, capacity, window=window) == bins


@pytest.mark.parametrize(
    ("lengths", "capacity", "expected"),
    [
        ([], 10, []),
        ([10], 10, [[0]]),
        ([6, 6, 4, 4], 10, [[0, 2], [1, 3]]),
        ([3, 7, 5, 5], 10, [[0, 1], [2, 3]]),
        ([1] * 5, 2, [[0, 1], [2, 3], [4]]),
    ],
    ids=["nothing", "exactly full", "pairs", "decreasing first", "many small"],
)
def test_examples(lengths, capacity, expected):
    assert pack(lengths, capacity) == expected


def test_rows_are_nearly_full():
    lengths = np.random.default_rng(0).integers(50, 900, 5000)
    bins = pack(lengths, 2048)
    assert lengths.sum() / (len(bins) * 2048) > 0.98


def test_a_sample_over_capacity_is_refused():
    with pytest.raises(DataError, match="sample 1 has 12 tokens; a row holds 10"):
        pack([3, 12], 10)
