"""Megatron's optimizer for the model chunks, and a view of its fp32 master weights."""

import math
from collections.abc import Iterator

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import OptimizerConfig as McoreOptimizerConfig
from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import MegatronOptimizer

from laver_mcore.config.schema import Config
from laver_mcore.parallel import Topology


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
    return get_megatron_optimizer(mcore, models)


def set_learning_rate(optimizer: MegatronOptimizer, learning_rate: float) -> None:
    """Give every parameter group the learning rate of this step."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group.get("lr_mult", 1.0)


def apply_gradients(optimizer: MegatronOptimizer) -> tuple[float, bool]:
    """Clip and step; returns (global gradient norm before clipping, whether the weights were changed).

    A norm that is not finite leaves weights and optimizer state as they were: the step is skipped. The norm is the
    same number on every rank, and so is the decision.
    """
    if optimizer.prepare_grads():
        return math.nan, False
    grad_norm = float(optimizer.get_grad_norm())
    if not math.isfinite(grad_norm):
        return grad_norm, False
    for part in optimizer.chained_optimizers:
        parameters = [] if getattr(part, "is_stub_optimizer", False) else part.get_parameters()
        if parameters and part.config.clip_grad > 0.0:
            clip_grad_by_total_norm_fp32(parameters, max_norm=part.config.clip_grad, total_norm=grad_norm)
    return grad_norm, bool(optimizer.step_with_ready_grads())


def _distributed(optimizer: MegatronOptimizer) -> list[DistributedOptimizer]:
    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    return [p for p in parts if isinstance(p, DistributedOptimizer) and not getattr(p, "is_stub_optimizer", False)]


def master_weights(
    models: list[DistributedDataParallel], optimizer: MegatronOptimizer, topology: Topology
) -> Iterator[tuple[torch.nn.Parameter, torch.Tensor]]:
    """Every parameter of this rank with its fp32 master, whole on this model shard.

    The distributed optimizer holds a slice of each master per data-parallel rank; slices are summed into the whole,
    one parameter at a time, so all data-parallel ranks must iterate together.
    """
    owners = {p: part for part in _distributed(optimizer) for p in part.model_param_gbuf_map}
    for model in models:
        for parameter in model.module.parameters():
            if parameter.dtype == torch.float32 or not hasattr(parameter, "main_param"):
                yield parameter, parameter.detach().float()
            elif not getattr(parameter, "main_param_sharded", False):
                yield parameter, parameter.main_param
            else:
                whole = torch.zeros(parameter.numel(), dtype=torch.float32, device=parameter.device)
                if parameter.main_param is not None:
                    owned = owners[parameter]._get_model_param_range_map(parameter)["param"]
                    whole[owned.start : owned.end] = parameter.main_param.detach().flatten()
                dist.all_reduce(whole, group=topology.dp_group)
                yield parameter, whole.view_as(parameter)
