"""Packing: every sample once, no row over capacity, the same rows every time."""

import numpy as np
import pytest

from laver_mcore.data.errors import DataError
from laver_mcore.data.order.packing import pack


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


def first_fit(lengths, capacity):
    """How many bins first-fit-decreasing takes, written as a loop."""
    free = []
    for length in sorted(lengths, reverse=True):
        for number, space in enumerate(free):
            if space >= length:
                free[number] -= length
                break
        else:
            free.append(capacity - length)
    return len(free)


def fewest(lengths, capacity):
    """The fewest bins of any packing, found by trying all."""
    best = len(lengths)

    def place(position, free):
        nonlocal best
        if len(free) >= best:
            return
        if position == len(lengths):
            best = len(free)
            return
        for number, space in enumerate(free):
            if space >= lengths[position]:
                place(position + 1, [*free[:number], space - lengths[position], *free[number + 1 :]])
        place(position + 1, [*free, capacity - lengths[position]])

    place(0, [])
    return best


@pytest.mark.parametrize("trial", range(20))
def test_as_many_bins_as_first_fit_decreasing_and_hardly_more_than_the_fewest(trial):
    draw = np.random.default_rng(100 + trial)
    lengths = draw.integers(10, 60, 9).tolist()
    num_bins = len(pack(lengths, 100))
    assert num_bins == first_fit(lengths, 100)
    # First-fit-decreasing needs at most 11/9 of the fewest, and 6/9 more (Dosa 2007).
    assert 9 * num_bins <= 11 * fewest(lengths, 100) + 6


@pytest.mark.parametrize("window", [16, 64, 1000])
@pytest.mark.parametrize("trial", range(8))
def test_with_costs_every_sample_once_and_rows_hardly_more(trial, window):
    draw = np.random.default_rng(trial)
    capacity, num = 300, 400
    lengths, costs = draw.integers(1, capacity + 1, num), draw.integers(0, 5000, num)
    bins = pack(lengths, capacity, window=window, costs=costs)
    assert sorted(index for members in bins for index in members) == list(range(num))
    for members in bins:
        assert 0 < sum(lengths[index] for index in members) <= capacity
        assert members == sorted(members)
        assert members[0] // window == members[-1] // window
    for start in range(0, num, window):
        rows = sum(start <= members[0] < start + window for members in bins)
        assert rows <= 1.02 * first_fit(lengths[start : start + window], capacity)  # what evenness may take


@pytest.mark.parametrize(
    ("lengths", "costs", "capacity", "expected"),
    [
        ([5, 5, 5, 5], [8, 7, 2, 1], 10, [[0, 3], [1, 2]]),
        ([5, 5, 5, 5], [1, 8, 2, 7], 10, [[0, 1], [2, 3]]),
        ([5, 5, 5, 5], [0, 0, 9, 9], 10, [[0, 2], [1, 3]]),
        ([8, 4, 4, 2], [9, 5, 4, 0], 10, [[0, 3], [1, 2]]),
        # The cheapest row has no room left for the last one.
        ([8, 6, 4, 2], [1, 5, 1, 3], 10, [[0, 3], [1, 2]]),
    ],
    ids=["dear with cheap", "in any order", "no two dear ones", "full and even", "room first"],
)
def test_examples_with_costs(lengths, costs, capacity, expected):
    assert sorted(pack(lengths, capacity, costs=np.array(costs))) == expected


def test_every_window_is_evened_out_by_its_own_costs():
    costs = np.array([0, 0, 9, 9, 9, 0, 9, 0])
    bins = pack([5] * 8, 10, window=4, costs=costs)
    assert sorted(bins) == [[0, 2], [1, 3], [4, 5], [6, 7]]


def test_rows_are_nearly_full():
    lengths = np.random.default_rng(0).integers(50, 900, 5000)
    bins = pack(lengths, 2048)
    assert lengths.sum() / (len(bins) * 2048) > 0.98


def test_a_sample_over_capacity_is_refused():
    with pytest.raises(DataError, match="sample 1 has 12 tokens; a row holds 10"):
        pack([3, 12], 10)
