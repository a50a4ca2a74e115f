"""Megatron's optimizer for the model chunks, and where it keeps the fp32 master weights."""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import OptimizerConfig as McoreOptimizerConfig
from megatron.core.optimizer import get_megatron_optimizer, get_standard_config_overrides
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.optimizer.optimizer_config import ParamKey, ParamPredicate

from laver_mcore.config.schema import Config
from laver_mcore.megatron.lazy import keep_still
from laver_mcore.megatron.versions import grads_for_norm
from laver_mcore.megatron.weight_shards import Bucket


def build_optimizer(config: Config, models: list[DistributedDataParallel]) -> MegatronOptimizer:
    """Adam as Megatron builds it: plain, mixed precision or distributed, fused where apex or TE is installed."""
    settings = config.optimizer
    mcore = McoreOptimizerConfig(
        optimizer="adam",
        lr=settings.lr,
        min_lr=settings.min_lr,
        weight_decay=settings.weight_decay,
        adam_beta1=settings.adam_beta1,
        adam_beta2=settings.adam_beta2,
        adam_eps=settings.adam_eps,
        clip_grad=settings.clip_grad,
        bf16=config.train.bf16,
        params_dtype=torch.bfloat16 if config.train.bf16 else torch.float32,
        use_distributed_optimizer=config.parallel.use_distributed_optimizer,
        log_num_zeros_in_grad=False,
    )
    optimizer = get_megatron_optimizer(mcore, models, _overrides(mcore, models))
    use_fused_adam(optimizer)
    for part in _working_parts(optimizer):
        keep_still(part.optimizer, _lazy_masters(part))
    return optimizer


def _overrides(mcore: McoreOptimizerConfig, models: Sequence[torch.nn.Module]) -> dict[ParamKey, Any]:
    """Megatron's standard groups, and one for every factor that parameters are marked with."""
    overrides: dict[ParamKey, Any] = get_standard_config_overrides(mcore)
    for mark in ("lr_mult", "wd_mult"):
        factors = {getattr(p, mark) for model in models for p in model.parameters() if hasattr(p, mark)}
        for factor in sorted(factors):
            marked = ParamPredicate(f"{mark} {factor}", partial(_has, mark=mark, factor=factor))
            overrides[ParamKey(predicate=marked)] = {mark: factor}
    return overrides


def _has(parameter: torch.nn.Parameter, mark: str, factor: float) -> bool:
    return getattr(parameter, mark, None) == factor


_MASTERS = (
    ("model_fp32_groups", "shard_fp32_groups"),
    ("model_float16_groups", "shard_fp32_from_float16_groups"),
    ("float16_groups", "fp32_from_float16_groups"),
    ("fp32_from_fp32_groups", "fp32_from_fp32_groups"),
)
"""Megatron's lists of parameters and of what its Adam updates in their places: distributed and mixed precision."""


def _lazy_masters(part: Any) -> list[torch.nn.Parameter]:
    """What Adam updates of the parameters that are marked `lazy`, here: whole, or this rank's shard.

    Not by a group of their own, as rates have: Megatron tells saved groups apart by their rates alone.
    """
    pairs = [(p, p) for group in part.param_groups for p in group["params"]]  # fp32 without shards
    for models, masters in _MASTERS:
        for ours, theirs in zip(getattr(part, models, ()), getattr(part, masters, ()), strict=True):
            pairs += zip(ours, theirs, strict=True)
    return list(dict.fromkeys(master for model, master in pairs if getattr(model, "lazy", False)))


def set_rates(optimizer: MegatronOptimizer, learning_rate: float, weight_decay: float) -> None:
    """Give every parameter group the learning rate and weight decay of this step.

    Megatron marks groups without decay (biases and norms) by a multiplier, and leaves it to its own scheduler to
    multiply.
    """
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group.get("lr_mult", 1.0)
        group["weight_decay"] = weight_decay * group.get("wd_mult", 1.0)


def used_learning_rate(optimizer: MegatronOptimizer, device: torch.device) -> torch.Tensor:
    """The rate that the optimizer works with, read back from its groups without their multipliers, fp64 scalar.

    Megatron gives every rank all groups of the model, those in which it has no parameter included, so a pipeline stage
    where nothing trains knows it as well.
    """
    groups = [group for part in _working_parts(optimizer) for group in part.optimizer.param_groups]
    rates = [group["lr"] / group.get("lr_mult", 1.0) for group in groups]
    return torch.full((), max(rates, default=math.nan), dtype=torch.float64, device=device)


def apply_gradients(optimizer: MegatronOptimizer) -> tuple[torch.Tensor, torch.Tensor]:
    """Clip and step; returns (global gradient norm before clipping, whether the weights were changed), on the device.

    A norm that is not finite leaves weights and optimizer state as they were: the step is skipped. The norm is the
    same number on every rank, and so is the decision. Torch's fused Adam takes both clipping and the decision from the
    device; the host waits for the norm only where apex's or Transformer Engine's Adam is in use.
    """
    optimizer.prepare_grads()
    norm = _gradient_norm(optimizer)
    applied = torch.isfinite(norm)
    parts = _working_parts(optimizer)
    if all(isinstance(part.optimizer, torch.optim.Adam) for part in parts):
        for part in parts:
            inner, limit = part.optimizer, part.config.clip_grad
            inner.found_inf = (~applied).float()
            inner.grad_scale = ((norm + 1e-6) / limit).clamp(min=1.0) if limit > 0.0 else None
        optimizer.step_with_ready_grads()
    elif bool(applied):
        for part in parts:
            if part.config.clip_grad > 0.0:
                clip_grad_by_total_norm_fp32(
                    part.get_parameters(), max_norm=part.config.clip_grad, total_norm=float(norm)
                )
        optimizer.step_with_ready_grads()
    return norm, applied


def _gradient_norm(optimizer: MegatronOptimizer) -> torch.Tensor:
    """Euclidean norm of all gradients of the model, each counted once, fp32 scalar on the device."""
    total = torch.zeros((), device=torch.cuda.current_device())
    for part in _parts(optimizer):
        grads = grads_for_norm(part)
        squares = torch.zeros_like(total)
        if grads:
            squares += torch.stack(torch._foreach_norm(grads)).square().sum()
        dist.all_reduce(squares, group=part.get_grad_stats_parallel_group())
        total += squares
    return total.sqrt()


def _parts(optimizer: MegatronOptimizer) -> list[Any]:
    return list(getattr(optimizer, "chained_optimizers", [optimizer]))


def _working_parts(optimizer: MegatronOptimizer) -> list[Any]:
    """Those that have parameters: on a pipeline stage where nothing trains there is a stub."""
    return [part for part in _parts(optimizer) if not getattr(part, "is_stub_optimizer", False)]


def use_fused_adam(optimizer: MegatronOptimizer) -> None:
    """Let torch's Adam, where Megatron falls back to it, run as one kernel that can skip a step by itself."""
    for part in _working_parts(optimizer):
        if isinstance(part.optimizer, torch.optim.Adam):
            for group in part.optimizer.param_groups:
                group["fused"], group["foreach"] = True, None


def distributed_parts(optimizer: MegatronOptimizer) -> list[DistributedOptimizer]:
    """Those that share their state out over data-parallel ranks."""
    return [part for part in _working_parts(optimizer) if isinstance(part, DistributedOptimizer)]


def weight_buckets(chunks: Sequence[torch.nn.Module], optimizer: MegatronOptimizer) -> list[Bucket]:
    """How this rank's trainable parameters are cut into fp32 masters: the distributed optimizer's shards, or not."""
    parts = distributed_parts(optimizer)
    if not parts:
        trainable = [p for chunk in chunks for p in chunk.parameters() if p.requires_grad]
        return [Bucket(places={p: (0, p.numel())}, numel=p.numel(), group=None) for p in trainable]
    return [
        Bucket(
            places={
                parameter: (start - bucket.offset, end - bucket.offset)
                for parameter, (start, end, index) in buffer.param_index_map.items()
                if index == bucket.bucket_id
            },
            numel=bucket.grad_data.numel(),
            group=part.data_parallel_group,
        )
        for part in parts
        for buffer in part.buffers
        for bucket in buffer.buckets
    ]


def master_shard(parameter: torch.nn.Parameter, start: int, stop: int) -> torch.Tensor:
    """Elements [start, stop) of the flattened fp32 master of `parameter`, which `weight_buckets` says are kept here."""
    if parameter.dtype == torch.float32:
        return parameter.detach().view(-1)[start:stop]  # is its own master, whole on every rank
    master: torch.Tensor = parameter.main_param.detach().view(-1)  # type: ignore[attr-defined]
    assert master.numel() == stop - start
    return master
