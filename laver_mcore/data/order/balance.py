"""Who does what within a step: rows to data-parallel ranks and micro-batches, images to tensor-parallel ranks."""

import itertools
from collections.abc import Sequence

import numpy as np


def share_out(costs: Sequence[int] | np.ndarray, num_shares: int) -> list[list[int]]:
    """Items in `num_shares` shares of as many items each, about equally dear: the dearest item first, to the
    cheapest share that has room (longest processing time). Items ascend within a share.
    """
    costs = np.asarray(costs, dtype=np.int64)
    room = costs.size // num_shares
    load = np.zeros(num_shares, dtype=np.int64)
    shares: list[list[int]] = [[] for _ in range(num_shares)]
    never = np.iinfo(np.int64).max
    for item in np.argsort(-costs, kind="stable"):
        cheapest = int(load.argmin())
        shares[cheapest].append(int(item))
        load[cheapest] = load[cheapest] + costs[item] if len(shares[cheapest]) < room else never
    return [sorted(share) for share in shares]


def assign_rows(
    costs: Sequence[int] | np.ndarray, *, dp_size: int, micro_batch_size: int
) -> list[list[list[int]]]:
    """The rows of a step as [rank][micro-batch][row of the micro-batch], ranks and then micro-batches even in cost.

    The number of rows is a multiple of dp_size * micro_batch_size.
    """
    costs = np.asarray(costs, dtype=np.int64)
    ranks = []
    for rows in share_out(costs, dp_size):
        parts = share_out(costs[rows], len(rows) // micro_batch_size)
        ranks.append(sorted([rows[row] for row in part] for part in parts))
    return ranks


def imbalance(loads: Sequence[float] | np.ndarray) -> float:
    """How much longer the slowest takes than the mean: max / mean - 1."""
    loads = np.asarray(loads, dtype=np.float64)
    return float(loads.max() / loads.mean() - 1) if loads.size and loads.any() else 0.0


def image_shares(grids: Sequence[tuple[int, int]], num_shares: int) -> list[tuple[int, int]]:
    """Cut images of these grids into contiguous shares (start, stop), the largest of them as small as can be.

    Shares without an image are at the end.
    """
    num_tokens = [height * width for height, width in grids]
    largest = max([0, *num_tokens, -(-sum(num_tokens) // num_shares)])
    limit = sum(num_tokens)
    while largest < limit:
        middle = (largest + limit) // 2
        if len(_cut(num_tokens, middle)) <= num_shares:
            limit = middle
        else:
            largest = middle + 1
    cuts = _cut(num_tokens, largest)
    cuts += [len(num_tokens)] * (num_shares - len(cuts))
    return list(itertools.pairwise([0, *cuts]))


def _cut(num_tokens: Sequence[int], limit: int) -> list[int]:
    """Where shares end that are filled, one after the other, up to `limit` tokens."""
    ends, used = [], 0
    for position, tokens in enumerate(num_tokens):
        if used + tokens > limit:
            ends.append(position)
            used = 0
        used += tokens
    return [*ends, len(num_tokens)]
