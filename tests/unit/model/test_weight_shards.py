"""Where the elements of cut parameters are kept: against a brute-force walk over every element of a bucket."""

import queue
import threading
from collections import defaultdict
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from laver_mcore.megatron import weight_shards
from laver_mcore.megatron.weight_shards import Bucket, _pieces, move_pieces

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


@pytest.fixture
def mail(monkeypatch):
    """Ranks are threads that send each other tensors; what travelled, in elements."""
    boxes, local, travelled = defaultdict(queue.Queue), threading.local(), []

    def send(tensor, to, group):
        travelled.append(tensor.numel())
        boxes[local.rank, to].put(tensor.clone())

    def receive(tensor, source, group):
        tensor.copy_(boxes[source, local.rank].get(timeout=10))

    monkeypatch.setattr(weight_shards.dist, "send", send)
    monkeypatch.setattr(weight_shards.dist, "recv", receive)
    monkeypatch.setattr(weight_shards.dist, "get_global_rank", lambda group, rank: rank)
    return local, travelled


def on_every_rank(bucket, local, work):
    """What `work(bucket, rank)` returns on each."""
    found = {}

    def run(rank):
        local.rank = rank
        group = SimpleNamespace(size=lambda: bucket.num_shards, rank=lambda: rank)
        found[rank] = work(replace(bucket, group=group), rank)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(bucket.num_shards)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [found[rank] for rank in range(bucket.num_shards)]


@pytest.mark.parametrize(("lengths", "ranks", "wave"), LAYOUTS.values(), ids=LAYOUTS)
def test_one_rank_puts_a_parameter_together_and_hands_it_out_again(lengths, ranks, wave, mail, monkeypatch):
    """Every element is its place in the bucket; the keeper keeps most of it, and nothing of that travels."""
    monkeypatch.setattr(weight_shards, "WAVE_BYTES", 4 * wave)
    local, travelled = mail
    bucket, cpu = make(lengths, ranks), torch.device("cpu")

    def shard(here, parameter, fill=None):
        low, high = here.held(parameter)
        start = here.places[parameter][0]
        values = torch.arange(start + low, start + high, dtype=torch.float32) if low < high else None
        return values if fill is None or values is None else torch.full_like(values, fill)

    def there_and_back(here, rank):
        wholes, back = {}, {}
        for parameter in here.places:
            whole = torch.empty(parameter.numel()) if here.keeps(parameter) else None
            move_pieces(here, parameter, shard(here, parameter), whole, gather=True, device=cpu)
            if whole is not None:
                wholes[parameter] = whole.clone()
            back[parameter] = shard(here, parameter, fill=-1.0)
            move_pieces(here, parameter, back[parameter], whole, gather=False, device=cpu)
            wanted = shard(here, parameter)
            assert (wanted is None) == (back[parameter] is None)
            assert wanted is None or torch.equal(back[parameter], wanted)
        return wholes

    found = on_every_rank(bucket, local, there_and_back)
    away = 0
    for parameter, (start, stop) in bucket.places.items():
        (whole,) = [wholes[parameter] for wholes in found if parameter in wholes]  # one rank alone has it
        assert torch.equal(whole, torch.arange(start, stop, dtype=torch.float32))
        counts = torch.bincount(torch.arange(start, stop) // bucket.shard_numel, minlength=ranks)
        assert counts[bucket.keeper(parameter)] == counts.max()
        away += int(counts.sum() - counts.max())
    assert sum(travelled) == 2 * away
    assert max(travelled, default=0) <= wave
