"""Rows as a pure function of (seed, row), for one set and for weighted mixtures; how full rows are."""

import itertools
import time
from collections import Counter

import numpy as np
import pytest

from laver_mcore.data.errors import DataError
from laver_mcore.data.order.rows import RowOrder


def order_of(sizes, weights=None, *, seed=3, seq_length=64, window=32):
    lengths = np.random.default_rng(0).integers(4, 40, sum(sizes))
    starts = np.cumsum([0, *sizes])
    return RowOrder(
        lengths, seq_length=seq_length, seed=seed, window=window, set_starts=starts, weights=weights
    )


def counts(order, epochs, sizes):
    """How often each sample stands in the rows of the first epochs, by set."""
    rows = sum(order.rows_per_epoch(epoch) for epoch in range(epochs))
    seen = Counter(number for row in range(rows) for number in order.row(row))
    starts = np.cumsum([0, *sizes])
    return [[seen[number] for number in range(a, b)] for a, b in itertools.pairwise(starts)]


@pytest.mark.parametrize(
    ("weights", "epochs", "expected"),
    [
        (None, 3, [{3}, {3}]),
        ((1, 1), 2, [{2}, {2}]),
        ((2, 1), 2, [{4}, {2}]),
        ((1, 0), 2, [{2}, {0}]),
        ((0.5, 1), 2, [{1}, {2}]),
        ((0.1, 1), 10, [{1}, {10}]),
        ((0.3, 1.5), 2, [{0, 1}, {3}]),
    ],
)
def test_a_mixture_sees_every_sample_of_a_set_equally_often(weights, epochs, expected):
    sizes = (30, 20)
    found = counts(order_of(sizes, weights), epochs, sizes)
    assert [set(of_set) for of_set in found] == expected


@pytest.mark.parametrize(
    ("weight", "size", "expected"),
    [
        (0.3, 30, [9] * 8),  # 0.3 is a little less in binary, and 8.99... would be cut
        (0.7, 20, [14] * 8),
        (0.1, 30, [3] * 8),
        (1.1, 10, [11] * 8),
        (0.25, 6, [1, 2, 1, 2, 1, 2, 1, 2]),
        (2.5, 3, [7, 8, 7, 8, 7, 8, 7, 8]),
    ],
)
def test_an_epoch_holds_its_share_of_a_set(weight, size, expected):
    order = order_of((size, 20), (weight, 1))
    assert [int((order.samples_of(epoch) < size).sum()) for epoch in range(8)] == expected


def test_equal_weights_are_the_plain_order():
    plain, weighted = order_of((30, 20)), order_of((30, 20), (1, 1))
    assert [plain.row(r) for r in range(60)] == [weighted.row(r) for r in range(60)]


def test_rows_are_a_pure_function_of_seed_and_row():
    one = order_of((30, 20), (0.7, 2))
    late = order_of((30, 20), (0.7, 2))
    rows = (131, 4, 77, 0)
    assert [late.row(r) for r in rows] == [one.row(r) for r in rows]
    other = order_of((30, 20), (0.7, 2), seed=4)
    assert [other.row(r) for r in rows] != [one.row(r) for r in rows]


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ((1,), "1 weights for 2 data sets"),
        ((1, -1), "must not be negative"),
        ((0, 0), "nor all 0"),
    ],
)
def test_unusable_weights(weights, message):
    with pytest.raises(DataError, match=message):
        order_of((30, 20), weights)


def test_an_epoch_without_samples_is_an_error():
    with pytest.raises(DataError, match="holds no sample"):
        order_of((3, 3), (0.1, 0.1)).row(0)


def llava_like_lengths(num):
    """Tokens of a LLaVA-OneVision-like mix: images of 729 tokens, text with a long tail."""
    draw = np.random.default_rng(0)
    images = draw.choice([0, 1, 1, 1, 1, 2, 4], num) * 731
    return np.minimum(images + np.exp(draw.normal(5.2, 0.9, num)).astype(np.int64) + 30, 8192)


def test_rows_of_8k_are_filled_to_97_percent():
    lengths = llava_like_lengths(20_000)
    order = RowOrder(lengths, seq_length=8192, seed=0)
    fill = lengths.sum() / (order.rows_per_epoch(0) * 8192)
    # One sample a row, padded to the longest of 8: the batching that packing replaces.
    naive = lengths.sum() / sum(8 * group.max() for group in lengths[: len(lengths) // 8 * 8].reshape(-1, 8))
    assert fill >= 0.97
    assert naive < 0.6


def test_packing_half_a_million_samples_takes_seconds():
    lengths = llava_like_lengths(100_000)
    started = time.process_time()  # of this process: what else runs on the machine does not count
    RowOrder(lengths, seq_length=8192, seed=0).row(0)
    assert time.process_time() - started < 10  # about 1 s; 558,000 samples take about 5
