"""Whether a run can be trusted to be one run: replicas that have the same weights, and a loss without spikes."""

import hashlib
import statistics
from collections import deque

import torch
import torch.distributed as dist

from laver_mcore.model.parameters import named_parameters
from laver_mcore.train.engine import Engine
from laver_mcore.train.skips import DivergedError

SPIKE = 10.0
"""As Megatron-LM's SPIKY_LOSS_FACTOR: a loss that is so many times what is usual."""
_USUAL = 100
"""Steps whose median is what is usual."""
_FEWEST = 20


def check_replicas(engine: Engine, iteration: int) -> None:
    """`DivergedError` on all ranks where a weight differs between data-parallel ranks, naming the first and its ranks.

    Hashes of all weights travel, not the weights; whatever has a GPU is copied to the host.
    """
    if engine.config.parallel.overlap_param_gather:
        for wrapped in engine.models:
            wrapped.start_param_sync(force_sync=True)
    mine = {item.name: _hash(item.parameter) for item in named_parameters(engine.chunks, engine.topology)}
    group = engine.topology.dp_cp_group
    others: list[dict[str, bytes]] = [{}] * group.size()
    dist.all_gather_object(others, mine, group=group)
    found = None
    for name in mine:
        hashes = [other[name] for other in others]
        if len(set(hashes)) > 1:
            usual = statistics.mode(hashes)
            ranks = [dist.get_global_rank(group, i) for i, each in enumerate(hashes) if each != usual]
            found = f"{name} on rank {', '.join(map(str, ranks))}"
            break
    gathered: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, found)
    first = next((each for each in gathered if each), None)
    if first is not None:
        raise DivergedError(
            f"iteration {iteration}: data-parallel ranks no longer have the same weights (first {first}); "
            "the last checkpoint is as it was"
        )


def _hash(parameter: torch.nn.Parameter) -> bytes:
    whole = parameter.detach().cpu().contiguous().view(-1).view(torch.uint8)
    return hashlib.blake2b(whole.numpy().data, digest_size=16).digest()


class SpikeGuard:
    """Remembers the losses of the last steps; `DivergedError` where one is `SPIKE` times their median."""

    def __init__(self) -> None:
        self._last: deque[float] = deque(maxlen=_USUAL)

    def look(self, iteration: int, loss: torch.Tensor | None) -> None:
        """Take in the loss of a step, which the last rank has; all ranks take part and wait for it."""
        found = [None if loss is None else float(loss)]
        dist.broadcast_object_list(found, src=dist.get_world_size() - 1)
        value = found[0]
        assert value is not None
        usual = statistics.median(self._last) if len(self._last) >= _FEWEST else None
        if usual is not None and value > SPIKE * abs(usual):
            raise DivergedError(
                f"iteration {iteration}: the loss is {value:.4g}, more than {SPIKE:.0f} times what is usual "
                f"({usual:.4g}); the last checkpoint is as it was, and --skip-to passes over these samples"
            )
        if value == value:  # a step that was skipped for its NaN says nothing of what is usual
            self._last.append(value)
