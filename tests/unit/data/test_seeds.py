"""Each random draw behind the order of rows follows the seed and goes on from epoch to epoch, looked at alone."""

import numpy as np
import pytest

from laver_mcore.data.order.rows import RowOrder

NUM = 24  # samples a set; a draw repeats by chance once in 24 factorial times


def order_of(seed, num_sets=1, **options):
    """Every sample fills a row, so that packing has nothing to decide."""
    starts = [NUM * number for number in range(num_sets + 1)]
    return RowOrder(np.full(NUM * num_sets, 64), seq_length=64, seed=seed, set_starts=starts, **options)


def rows_of(order, epoch):
    first = sum(order.rows_per_epoch(earlier) for earlier in range(epoch))
    rows = [order.row(first + row) for row in range(order.rows_per_epoch(epoch))]
    assert {len(row) for row in rows} == {1}
    return [number for (number,) in rows]


def samples(seed, epoch):
    """In the order in which they are packed."""
    return order_of(seed).samples_of(epoch).tolist()


def places(seed, epoch):
    """Which of the packed rows stands first, second, ..."""
    order = order_of(seed)
    packed = order.samples_of(epoch).tolist()
    return [packed.index(number) for number in rows_of(order, epoch)]


def changes(seed, epoch):
    """The costs along the rows, which depend on which halves have changed places and on nothing else."""
    costs = np.arange(NUM) * 10
    return [int(costs[number]) for number in rows_of(order_of(seed, costs=costs), epoch)]


def half(seed, epoch):
    """Which samples take part in an epoch of half a set."""
    return sorted(rows_of(order_of(seed, weights=(0.5,)), epoch))


DRAWS = {"samples": samples, "places": places, "changes": changes, "half": half}


@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)
def test_a_draw_follows_the_seed(draw):
    assert draw(3, 0) == draw(3, 0)
    assert len({tuple(draw(seed, 0)) for seed in range(8)}) == 8


@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)
def test_a_draw_goes_on_from_epoch_to_epoch(draw):
    # Every other epoch: two halves of a set are one permutation, cut in the middle.
    assert len({tuple(draw(3, epoch)) for epoch in (0, 2, 4, 6)}) == 4


@pytest.mark.parametrize("draw", [samples, places, changes], ids=["samples", "places", "changes"])
def test_a_draw_holds_everything_once(draw):
    values = range(0, 10 * NUM, 10) if draw is changes else range(NUM)
    assert sorted(draw(5, 1)) == list(values)


def test_two_halves_of_an_epoch_are_the_set():
    for cycle in range(3):
        assert sorted(half(5, 2 * cycle) + half(5, 2 * cycle + 1)) == list(range(NUM))


def test_sets_of_one_size_have_draws_of_their_own():
    chosen = rows_of(order_of(3, num_sets=2, weights=(0.5, 0.5)), 0)
    first = {number for number in chosen if number < NUM}
    second = {number - NUM for number in chosen if number >= NUM}
    assert len(first) == len(second) == NUM // 2
    assert first != second


def test_the_seed_of_one_draw_is_not_that_of_another():
    """Permutations of the same length must not be the same because their seeds are."""
    found = [tuple(draw(3, 0)) for draw in (samples, places)]
    found.append(tuple(cost // 10 for cost in changes(3, 0)))
    assert len(set(found)) == len(found)
