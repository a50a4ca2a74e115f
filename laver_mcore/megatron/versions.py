"""What differs between Megatron-Core 0.16.1 and 0.19, asked of what is installed and never of its version."""

from functools import cache
from types import SimpleNamespace
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer


def grads_for_norm(part: Any) -> list[torch.Tensor]:
    """The gradients of an optimizer that count on this rank; newer Megatron-Core calls the method otherwise."""
    method = getattr(part, "get_grads_for_grad_norm", None) or part.get_main_grads_for_grad_norm
    grads: list[torch.Tensor] = method()
    return grads


@cache
def shifts_moments() -> bool:
    """Whether Megatron-Core cuts moments out of gathered buckets at offsets that count the padding between them.

    Two buckets are cut by its own code: the first has two elements and two of padding, which gathering leaves out, so
    the second begins at 2 where its parameter's index says 4.
    """
    first, second = (torch.nn.Parameter(torch.zeros(2)) for _ in range(2))
    buffer = SimpleNamespace(
        param_index_map={first: (0, 2, 0), second: (4, 6, 1)},
        bucket_indices=[(0, 4), (4, 12)],
        buckets=[SimpleNamespace(numel_unpadded=2, offset=0), SimpleNamespace(numel_unpadded=8, offset=4)],
        numel_unpadded=12,
    )
    gathered = {"exp_avg": torch.arange(10.0), "numel_unpadded": 10}
    stub = SimpleNamespace(
        buffers=[buffer],
        gbuf_ranges=[{"float": []}],
        get_parameter_state_dp_zero=lambda **_: {0: {"float": gathered}},
    )
    weights = {
        name: ShardedTensor.from_rank_offsets(name, parameter)
        for name, parameter in (("first", first), ("second", second))
    }
    saved: Any = DistributedOptimizer.sharded_param_state_fully_reshardable(stub, weights, metadata={})
    return float(saved[1]["exp_avg"].data[0]) != 2.0
