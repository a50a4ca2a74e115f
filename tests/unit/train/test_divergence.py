"""Losses that spike, and weights that differ between replicas."""

import math

import pytest
import torch

from laver_mcore.train import divergence
from laver_mcore.train.divergence import SpikeGuard, check_replicas
from laver_mcore.train.skips import DivergedError

USUAL = [2.0 + 0.1 * math.sin(i) for i in range(40)]
LOSSES = {
    "usual": (USUAL, None),
    "a bump": ([*USUAL, 15.0, *USUAL], None),
    "a spike": ([*USUAL, 25.0], 41),
    "a spike in the first steps": ([*USUAL[:10], 100.0, 2.0], None),
    "not finite, which others look after": ([*USUAL, math.nan, 2.0], None),
    "infinite": ([*USUAL, math.inf], 41),
    "grows slowly": ([1.02**i for i in range(600)], None),
}


@pytest.mark.parametrize(("losses", "stops"), LOSSES.values(), ids=LOSSES)
def test_spikes(engine, losses, stops):
    guard = SpikeGuard()
    for iteration, loss in enumerate(losses[: (stops or 1000) - 1], start=1):
        guard.look(iteration, torch.tensor(loss))
    if stops is not None:
        with pytest.raises(
            DivergedError, match=rf"^iteration {stops}: the loss is .*; the last checkpoint is as it was"
        ):
            guard.look(stops, torch.tensor(losses[stops - 1]))


# What each of three ranks of a group adds to one weight -> the ranks that are named.
REPLICAS = {
    "equal": ([0.0, 0.0, 0.0], None),
    "one": ([0.0, 0.0, 1e-7], "2"),
    "the first": ([1e-7, 0.0, 0.0], "0"),
}


@pytest.mark.parametrize(("added", "named"), REPLICAS.values(), ids=REPLICAS)
def test_a_weight_that_differs_is_named_with_its_rank(engine, monkeypatch, added, named):
    """The group's other ranks are played: their hashes are those of the same weights, one of them changed."""
    weight = engine.chunks[0].decoder.final_layernorm.weight
    before = weight.detach().clone()

    def of_rank(extra):
        with torch.no_grad():
            weight.copy_(before).view(-1)[0].add_(extra)
        items = divergence.named_parameters(engine.chunks, engine.topology)
        return {item.name: divergence._hash(item.parameter) for item in items}

    others = [of_rank(extra) for extra in added]

    def gather(found, mine, group=None):
        found[:] = others if group is not None else [mine]

    monkeypatch.setattr(divergence.dist, "all_gather_object", gather)
    monkeypatch.setattr(divergence.dist, "get_global_rank", lambda group, rank: rank)
    try:
        if named is None:
            check_replicas(engine, 7)
        else:
            with pytest.raises(
                DivergedError, match=rf"iteration 7: .*final_layernorm.weight on rank {named}\)"
            ):
                check_replicas(engine, 7)
    finally:
        with torch.no_grad():
            weight.copy_(before)
