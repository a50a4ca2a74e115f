"""Random weights as a function of (seed, parameter name): drawn whole, cut to this rank's shard.

Every parallel layout therefore starts from the same model, which is what makes layouts comparable at all.
"""

import hashlib
import math

import torch

from laver_mcore.config.schema import Config, ModelConfig
from laver_mcore.megatron.parallel import Topology
from laver_mcore.model.parameters import EMBEDDING, NamedParameter, named_parameters
from laver_mcore.model.sharding import shard
from laver_mcore.model.vision_language import VisionLanguageModel


def _generator(seed: int, name: str) -> torch.Generator:
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def _std(name: str, shape: tuple[int, ...], config: ModelConfig) -> float:
    assert config.num_layers is not None
    if name.startswith("connector"):
        return math.sqrt(2.0 / shape[1])  # Kaiming-normal
    if name.endswith(("linear_proj.weight", "linear_fc2.weight")):
        return config.init_method_std / math.sqrt(
            2.0 * config.num_layers
        )  # Megatron's scaled residual outputs
    return config.init_method_std


def draw(
    name: str, shape: tuple[int, ...], config: ModelConfig, seed: int, std: float | None = None
) -> torch.Tensor:
    """The whole fp32 parameter of this global name, drawn on CPU; `std` where the name alone does not give it."""
    if name.endswith("bias"):
        return torch.zeros(shape)
    if name.endswith(("layernorm.weight", "layer_norm_weight")):
        return torch.ones(shape)
    if name.endswith(".lora_b"):
        return torch.zeros(shape)
    if name.endswith(".lora_a"):  # as peft: uniform within 1 / sqrt(inputs)
        return (2.0 * torch.rand(shape, generator=_generator(seed, name)) - 1.0) / math.sqrt(shape[1])
    std = _std(name, shape, config) if std is None else std
    return torch.randn(shape, generator=_generator(seed, name)) * std


def _cut(full: torch.Tensor, item: NamedParameter, topology: Topology) -> torch.Tensor:
    if not item.sharded:
        return full
    dim: int = item.parameter.partition_dim  # type: ignore[attr-defined]
    return shard(full, item.name, dim, topology.tp_rank, topology.tp_size)


@torch.no_grad()
def initialize(
    chunks: list[VisionLanguageModel], config: Config, vocab_size: int, topology: Topology
) -> None:
    """Give every parameter but the vision encoder's its value; `vocab_size` is the one before padding."""
    model, seed = config.model, config.train.seed
    added = {weight.name: weight.std for weight in config.objective.parameters(config)}
    for item in named_parameters(chunks, topology):
        if item.name.startswith("vision_encoder."):
            continue
        shape = list(item.parameter.shape)
        if item.sharded:
            shape[item.parameter.partition_dim] *= topology.tp_size  # type: ignore[attr-defined]
        if item.name in (EMBEDDING, "language_model.output_layer.weight"):
            # Padding differs from layout to layout: rows of real tokens are drawn, the rest is zero.
            full = torch.zeros(shape)
            full[:vocab_size] = draw(item.name, (vocab_size, shape[1]), model, seed)
        else:
            full = draw(item.name, tuple(shape), model, seed, added.get(item.name))
        item.parameter.copy_(_cut(full, item, topology))


@torch.no_grad()
def fill_new_rows(chunk: VisionLanguageModel, old: int, new: int) -> None:
    """Give the rows [old, new) of embedding and LM head, which a loaded checkpoint lacks, the mean of those before.

    All tensor-parallel ranks take part. The reasons are `convert.names.with_new_rows`'s.
    """
    for name, parameter in chunk.named_parameters() if new > old else ():
        if name not in (EMBEDDING, "language_model.output_layer.weight"):
            continue
        first = chunk.tp_group.rank() * len(parameter)
        ids = torch.arange(first, first + len(parameter), device=parameter.device)
        total = parameter[ids < old].float().sum(0)
        torch.distributed.all_reduce(total, group=chunk.tp_group)
        parameter[(ids >= old) & (ids < new)] = (total / old).to(parameter.dtype)
