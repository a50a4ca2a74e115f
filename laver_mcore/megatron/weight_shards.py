"""Which elements of each parameter a data-parallel rank keeps in fp32, and how shards become whole again.

Megatron's distributed optimizer lays parameters one behind another in a flat bucket and cuts it into equal parts, one
a rank, without regard to where a parameter ends:

    bucket   |  a a a a a a | b b b b c c c c c | d d d . |      . padding
    rank     |      0      |      1      |      2      |

So a rank keeps whole parameters, pieces of them, or nothing of them.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist

WAVE_BYTES = 64 * 2**20
"""Largest buffer that gathering shards takes at a time."""

Range = tuple[int, int]


@dataclass(frozen=True, kw_only=True, eq=False)
class Bucket:
    """Parameters that lie one behind another in `numel` elements, cut into one equal shard for each rank of `group`.

    Without a group every rank keeps them whole.
    """

    places: Mapping[torch.nn.Parameter, Range]
    numel: int
    group: dist.ProcessGroup | None

    @property
    def num_shards(self) -> int:
        """Ranks that share the bucket."""
        return 1 if self.group is None else self.group.size()

    @property
    def shard_numel(self) -> int:
        """Elements of one rank's shard, padding included."""
        return self.numel // self.num_shards

    def owners(self, parameter: torch.nn.Parameter) -> range:
        """The ranks that keep something of `parameter`."""
        start, stop = self.places[parameter]
        return range(start // self.shard_numel, (stop - 1) // self.shard_numel + 1)

    def held(self, parameter: torch.nn.Parameter, rank: int | None = None) -> Range:
        """The elements [start, stop) of the flattened `parameter` that `rank` (or this one) keeps.

        Empty where start >= stop.
        """
        if rank is None:
            rank = 0 if self.group is None else self.group.rank()
        start, stop = self.places[parameter]
        first = rank * self.shard_numel
        return max(start, first) - start, min(stop, first + self.shard_numel) - start

    def keeper(self, parameter: torch.nn.Parameter) -> int:
        """The rank that holds `parameter` whole where one has to: it keeps most of it already."""

        def kept(rank: int) -> int:
            start, stop = self.held(parameter, rank)
            return stop - start

        return max(self.owners(parameter), key=kept)

    def keeps(self, parameter: torch.nn.Parameter) -> bool:
        """Whether that is this rank."""
        return self.keeper(parameter) == (0 if self.group is None else self.group.rank())


def gather_shards(
    bucket: Bucket,
    shards: Mapping[torch.nn.Parameter, torch.Tensor],
    wholes: Mapping[torch.nn.Parameter, torch.Tensor | None],
    *,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """Fill each of `wholes` (flat, on any device) from the shards that the ranks of the bucket's group keep.

    `shards` are this rank's (flat, on any device), absent where it keeps nothing. The parameters in `wholes` must be
    the same on every rank; a rank that does not want one gives None. Travels as `dtype`, at most `WAVE_BYTES` at a
    time.
    """
    assert bucket.group is not None
    size, rank = bucket.group.size(), bucket.group.rank()
    per_rank = max(1, WAVE_BYTES // (dtype.itemsize * size))
    for first in range(0, bucket.shard_numel, per_rank):
        length = min(per_rank, bucket.shard_numel - first)
        pieces = list(_pieces(bucket, wholes, first, length))
        if not pieces:
            continue  # on all ranks alike
        send = torch.zeros(length, dtype=dtype, device=device)
        for owner, parameter, (start, stop), place in pieces:
            if owner == rank:
                offset = start - bucket.held(parameter)[0]
                send[place : place + stop - start].copy_(shards[parameter][offset : offset + stop - start])
        received = send.new_empty(size * length)
        dist.all_gather_into_tensor(received, send, group=bucket.group)
        for owner, parameter, (start, stop), place in pieces:
            whole = wholes[parameter]
            if whole is not None:
                at = owner * length + place
                whole[start:stop].copy_(received[at : at + stop - start])


def _pieces(
    bucket: Bucket, parameters: Mapping[torch.nn.Parameter, object], first: int, length: int
) -> Iterator[tuple[int, torch.nn.Parameter, Range, int]]:
    """What elements [first, first + length) of every rank's shard hold.

    Yields (rank, parameter, range of the flattened parameter, place in the wave), for `parameters` only.
    """
    for parameter in parameters:
        start, _ = bucket.places[parameter]
        for rank in bucket.owners(parameter):
            low, high = bucket.held(parameter, rank)
            wave = rank * bucket.shard_numel + first  # the wave's first element, counted in the bucket
            low, high = max(low, wave - start), min(high, wave + length - start)
            if low < high:
                yield rank, parameter, (low, high), low + start - wave


def move_pieces(
    bucket: Bucket,
    parameter: torch.nn.Parameter,
    shard: torch.Tensor | None,
    whole: torch.Tensor | None,
    *,
    gather: bool,
    device: torch.device,
) -> None:
    """Fill the keeper's `whole` from the shards that ranks keep of `parameter`, or, without `gather`, these from it.

    Both are flat, fp32, on any device; a rank that keeps nothing has no shard, and the keeper alone the whole. Only
    what the keeper does not keep travels, at most `WAVE_BYTES` at a time. All ranks of the group call it in one order.
    """
    group, own = bucket.group, bucket.keeper(parameter)
    rank = 0 if group is None else group.rank()
    for holder in bucket.owners(parameter):
        if rank not in (holder, own):
            continue
        start, stop = bucket.held(parameter, holder)
        for first in range(start, stop, WAVE_BYTES // 4):
            last = min(stop, first + WAVE_BYTES // 4)
            mine = [] if whole is None or rank != own else [whole[first:last]]
            if rank == holder:
                assert shard is not None
                mine.append(shard[first - start : last - start])
            if holder == own:
                source, target = reversed(mine) if gather else mine
                target.copy_(source)
            elif rank == (holder if gather else own):
                dist.send(mine[0].to(device).contiguous(), _global(group, own if gather else holder), group)
            else:
                received = torch.empty(last - first, device=device)
                dist.recv(received, _global(group, holder if gather else own), group)
                mine[0].copy_(received)


def _global(group: dist.ProcessGroup | None, rank: int) -> int:
    assert group is not None
    return dist.get_global_rank(group, rank)
