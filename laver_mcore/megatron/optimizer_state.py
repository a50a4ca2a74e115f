"""An optimizer's state on its way to a checkpoint and back, each data-parallel rank with its part of it.

Checkpoints hold fp32 masters and moments whole, under the model's own sharding, so that any layout can go on from them;
the distributed optimizer keeps pieces of them. Megatron-Core puts all of it together on every rank of a data-parallel
group, in host memory. Here each parameter has one keeper, which alone puts it together, writes it, reads it and hands
the pieces out again: a rank needs memory for its own share.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import MegatronOptimizer

from laver_mcore.megatron.optimizer import distributed_parts, use_fused_adam, weight_buckets
from laver_mcore.megatron.weight_shards import Bucket, move_pieces

_KEPT = ("param", "exp_avg", "exp_avg_sq")
"""What is kept of every parameter, by Megatron-Core's names."""


def sharded_parameters(model: dict[str, Any]) -> Iterator[Any]:
    """What a model's sharded state says of each of its parameters: sharded tensors, and factories of such."""
    pending: list[Any] = [extract_sharded_tensors_and_factories(model)[0]]
    while pending:
        found = pending.pop()
        if isinstance(found, dict | list | tuple):
            pending += found.values() if isinstance(found, dict) else found
        else:
            yield found


def beside(sharded: Any, prefix: str, whole: torch.Tensor, *, keeps: bool | None) -> Any:
    """What a checkpoint holds of a parameter besides itself, sharded as it is, `prefix` before its key.

    `keeps` says whether this rank's is the one that counts of data-parallel replicas; None: as with the parameter.
    """
    changed: dict[str, Any] = {"key": f"{prefix}.{sharded.key}", "data": whole.view(sharded.data.shape)}
    if keeps is not None:
        changed["replica_id"] = (*sharded.replica_id[:-1], 1 - keeps)
    if isinstance(sharded, ShardedTensor):
        changed["dtype"] = whole.dtype
    return replace(sharded, **changed)


def sharded_state(
    optimizer: MegatronOptimizer, model: dict[str, Any], content: dict[str, Any], *, is_loading: bool
) -> dict[str, Any]:
    """What a checkpoint holds of an optimizer, on this rank; `model` is the chunks' sharded state. All take part.

    To be loaded into: tensors of their own, which `load_state` takes.
    """
    parts = distributed_parts(optimizer)
    if not parts:
        found: dict[str, Any] = optimizer.sharded_state_dict(model, is_loading=is_loading, metadata=content)
        return found
    (part,) = parts
    if is_loading and not part.optimizer.state:
        # Megatron-Core allocates them for apex's and Transformer Engine's Adam alone; all values are loaded over.
        part._init_optimizer_states_with_dummy_values()
    state: dict[str, Any] = part.state_dict()
    if is_loading:
        part.load_state_dict(part.state_dict())
    state["param_state"] = _param_state(part, model, is_loading)
    return state


def _param_state(part: DistributedOptimizer, model: dict[str, Any], is_loading: bool) -> dict[str, Any]:
    described = {sharded.data: sharded for sharded in sharded_parameters(model)}
    found: dict[str, Any] = {}
    for number, (bucket, parameter) in enumerate(_parameters(part)):
        keeps = bucket.keeps(parameter)
        wholes = {name: torch.empty(parameter.numel()) for name in _KEPT} if keeps else {}
        if not is_loading:
            _move(part, bucket, parameter, wholes, gather=True)
        if keeps:
            found[str(number)] = {
                name: beside(described[parameter], f"optimizer.state.{name}", whole, keeps=True)
                for name, whole in wholes.items()
            }
    return found


def _parameters(part: DistributedOptimizer) -> Iterator[tuple[Bucket, torch.nn.Parameter]]:
    for bucket in weight_buckets([], part):
        for parameter in bucket.places:
            yield bucket, parameter


def _move(
    part: DistributedOptimizer,
    bucket: Bucket,
    parameter: torch.nn.Parameter,
    wholes: dict[str, torch.Tensor],
    *,
    gather: bool,
) -> None:
    start, stop = bucket.held(parameter)
    shards = part._get_main_param_and_optimizer_states(parameter) if start < stop else {}
    for name in _KEPT:
        shard = shards[name].detach().view(-1) if shards else None
        device = torch.empty(0, device=torch.cuda.current_device()).device
        move_pieces(bucket, parameter, shard, wholes.get(name), gather=gather, device=device)


def load_state(optimizer: MegatronOptimizer, state: dict[str, Any]) -> None:
    """Put a loaded `sharded_state` into the optimizer; all ranks take part.

    Megatron gives all parameters one and the same step tensor, which torch's Adam would then advance once for each of
    them: each gets its own.
    """
    _count_in_whole_steps(state)
    parts = distributed_parts(optimizer)
    if not parts:
        optimizer.load_state_dict(state)
        use_fused_adam(optimizer)  # the saved groups may say otherwise
        return
    (part,) = parts
    loaded = state.pop("param_state", {})
    part.load_state_dict(state)
    for number, (bucket, parameter) in enumerate(_parameters(part)):
        wholes = {name: whole.view(-1) for name, whole in loaded.get(str(number), {}).items()}
        _move(part, bucket, parameter, wholes, gather=False)
    for parameter, values in part.optimizer.state.items():
        if "step" in values:
            values["step"] = values["step"].to(parameter.device, torch.float32, copy=True)
    use_fused_adam(optimizer)


def _count_in_whole_steps(state: Any) -> None:
    """torch's Adam counts its steps in a float, which Megatron saves; Transformer Engine's and apex's want an int."""
    for group in state.get("optimizer", {}).get("param_groups", []):
        if isinstance(group.get("step"), float):
            group["step"] = int(group["step"])
