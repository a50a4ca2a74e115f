"""Where the elements of cut parameters are kept: against a brute-force walk over every element of a bucket."""

from types import SimpleNamespace

import pytest
import torch

from laver_mcore.megatron.weight_shards import Bucket, _pieces

# Lengths of parameters with the gap before each, ranks, elements of a wave.
LAYOUTS = {
    "one_rank": ([(0, 7), (0, 5)], 1, 4),
    "cut_in_the_middle": ([(0, 10), (0, 6)], 2, 3),
    "one_parameter_over_all_ranks": ([(0, 32)], 4, 5),
    "many_on_one_rank": ([(0, 1), (0, 2), (0, 1), (0, 12)], 4, 16),
    "gaps_and_a_tail": ([(0, 3), (5, 9), (1, 1)], 4, 2),
    "a_rank_with_nothing": ([(0, 4), (8, 4)], 4, 3),
}


def make(lengths, ranks, rank=0):
    places, at = {}, 0
    for gap, length in lengths:
        at += gap
        places[torch.nn.Parameter(torch.zeros(length))] = (at, at + length)
        at += length
    numel = -(-at // ranks) * ranks
    return Bucket(places=places, numel=numel, group=SimpleNamespace(size=lambda: ranks, rank=lambda: rank))


@pytest.mark.parametrize(("lengths", "ranks", "wave"), LAYOUTS.values(), ids=LAYOUTS)
def test_held_ranges_cover_every_element_once(lengths, ranks, wave):
    bucket = make(lengths, ranks)
    for parameter, (start, stop) in bucket.places.items():
        kept = []
        for rank in range(ranks):
            low, high = bucket.held(parameter, rank)
            wanted = [e - start for e in range(start, stop) if e // bucket.shard_numel == rank]
            assert list(range(low, max(low, high))) == wanted
            assert (rank in bucket.owners(parameter)) == bool(wanted)
            kept += wanted
        assert kept == list(range(stop - start))
    assert bucket.held(parameter) == bucket.held(parameter, 0)


@pytest.mark.parametrize(("lengths", "ranks", "wave"), LAYOUTS.values(), ids=LAYOUTS)
def test_waves_carry_every_element_once_from_where_it_lies(lengths, ranks, wave):
    bucket = make(lengths, ranks)
    carried = {parameter: torch.zeros(parameter.numel()) for parameter in bucket.places}
    for first in range(0, bucket.shard_numel, wave):
        length = min(wave, bucket.shard_numel - first)
        for rank, parameter, (start, stop), place in _pieces(bucket, bucket.places, first, length):
            assert place >= 0
            assert place + stop - start <= length
            in_bucket = bucket.places[parameter][0] + start
            assert in_bucket == rank * bucket.shard_numel + first + place
            carried[parameter][start:stop] += 1
    assert all((counts == 1).all() for counts in carried.values())
