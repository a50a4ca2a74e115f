"""Ranks that hold the same batches silence the same samples, although each decodes other images."""

import torch
import torch.distributed as dist

from laver_mcore.data.loader import Agreement


def agreement(group: dist.ProcessGroup, device: torch.device) -> Agreement | None:
    """The exchange over a model replica's ranks (tensor x pipeline); None where there is only one.

    One number is summed each step; only when it is not 0 do the ranks tell each other which samples failed.
    """
    if group.size() == 1:
        return None

    def agree(silenced: frozenset[int]) -> tuple[frozenset[int], bool]:
        count = torch.tensor([len(silenced)], device=device)
        dist.all_reduce(count, group=group)
        if not int(count):
            return silenced, True
        everyone: list[list[int]] = [[] for _ in range(group.size())]
        dist.all_gather_object(everyone, sorted(silenced), group=group)
        union = frozenset(number for of_rank in everyone for number in of_rank)
        return union, all(frozenset(of_rank) == union for of_rank in everyone)

    return agree
