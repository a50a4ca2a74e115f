"""Parameters by their global names: the same name for the same weight under every parallel layout."""

import fnmatch
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from laver_mcore.config.errors import ConfigError, nearest
from laver_mcore.config.schema import Config
from laver_mcore.config.trainable import ADAPTERS, trains
from laver_mcore.megatron.parallel import Topology
from laver_mcore.model.vision_language import VisionLanguageModel

EMBEDDING = "language_model.embedding.word_embeddings.weight"
_OUTPUT = "language_model.output_layer.weight"


@dataclass(frozen=True, kw_only=True)
class NamedParameter:
    """One parameter of this rank. `owned` is true on exactly one of the ranks that hold the same numbers."""

    name: str
    parameter: torch.nn.Parameter
    sharded: bool
    owned: bool


def named_parameters(chunks: list[VisionLanguageModel], topology: Topology) -> Iterator[NamedParameter]:
    """Every parameter of this rank's chunks with its global name (layers counted over the whole model)."""
    for chunk in chunks:
        decoder: Any = chunk.decoder
        layers = [layer.layer_number - 1 for layer in decoder.layers]
        for local, parameter in chunk.named_parameters():
            name = local
            prefix = "language_model.decoder.layers."
            if local.startswith(prefix):
                index, rest = local[len(prefix) :].split(".", 1)
                name = f"{prefix}{layers[int(index)]}.{rest}"
            # With tied embeddings the last stage holds a copy of the first stage's weight.
            is_copy = local == _OUTPUT and chunk.share_embeddings_and_output_weights
            sharded = bool(getattr(parameter, "tensor_model_parallel", False))
            yield NamedParameter(
                name=EMBEDDING if is_copy else name,
                parameter=parameter,
                sharded=sharded,
                owned=not is_copy and (sharded or topology.tp_rank == 0),
            )


def unwrap(model: Any) -> VisionLanguageModel:
    """The `VisionLanguageModel` inside Megatron's data-parallel wrapper."""
    while not isinstance(model, VisionLanguageModel):
        model = model.module
    return model


Part = tuple[str, int, int]
"""Part of the model, its parameters, and how many of them train; over all ranks, each parameter counted once."""


@dataclass(frozen=True, kw_only=True)
class Training:
    """Which parameters train, and how: name patterns and factors."""

    trainable: tuple[str, ...]
    rates: tuple[tuple[str, float], ...] = ()
    """(pattern, factor of the learning rate); the last that matches wins."""
    lora: bool = False
    """Whether the decoder has adapters, which then are all that trains of it."""
    undecayed: frozenset[str] = frozenset()
    """Names that weight decay does not reach."""
    lazy: frozenset[str] = frozenset()
    """Names of which elements without gradient stay where they are."""

    def rate(self, name: str) -> float:
        """The factor of one parameter's learning rate."""
        return next((factor for p, factor in reversed(self.rates) if fnmatch.fnmatchcase(name, p)), 1.0)


def training_of(config: Config) -> Training:
    """What the recipe says; `ConfigError` for a factor that is none."""
    rates = []
    for item in config.optimizer.lr_mult:
        pattern, _, factor = item.rpartition("=")
        try:
            rates.append((pattern, float(factor)))
        except ValueError:
            rates.append(("", 0.0))
        if not pattern or not 0.0 < rates[-1][1] < math.inf:
            raise ConfigError(
                f"lr_mult {item!r} is no PATTERN=FACTOR with a factor above 0, such as connector.*=10"
            )
    added = config.objective.parameters(config)
    return Training(
        trainable=config.train.trainable,
        lora=config.model.lora_rank > 0,
        rates=tuple(rates),
        undecayed=frozenset(weight.name for weight in added if not weight.decays),
        lazy=frozenset(weight.name for weight in added if weight.lazy),
    )


def freeze_local(
    chunks: list[VisionLanguageModel], training: Training, topology: Topology
) -> tuple[list[str], list[Part]]:
    """Let only the parameters of this rank train that are to, and mark those with factors of their own.

    Returns all names, and the rank's contribution to the table of parts (tensor-parallel rank 0 speaks for all).
    """
    counts: dict[str, list[int]] = {}
    names = []
    for item in named_parameters(chunks, topology):
        trainable = trains(item.name, training.trainable, training.lora)
        item.parameter.requires_grad_(trainable)
        names.append(item.name)
        factor = training.rate(item.name)
        if factor != 1.0:
            item.parameter.lr_mult = factor  # type: ignore[attr-defined]
        if item.name in training.undecayed:
            item.parameter.wd_mult = 0.0  # type: ignore[attr-defined]
        if item.name in training.lazy:
            item.parameter.lazy = True  # type: ignore[attr-defined]
        if item.owned and topology.tp_rank == 0:
            number = item.parameter.numel() * (topology.tp_size if item.sharded else 1)
            label = _part(item.name) + (f" (lr x {factor:g})" if factor != 1.0 else "")
            part = counts.setdefault(label, [0, 0])
            part[0] += number
            part[1] += number if trainable else 0
    return names, [(name, total, trained) for name, (total, trained) in counts.items()]


def merge_parts(contributions: list[tuple[list[str], list[Part]]], training: Training) -> list[Part]:
    """The whole table from what `freeze_local` gave on every rank of one model replica.

    Raises `ConfigError` for a pattern that matches nothing.
    """
    all_names = sorted({name for names, _ in contributions for name in names})
    wanted = [("trainable", pattern) for pattern in training.trainable]
    for kind, pattern in [*wanted, *(("lr_mult", pattern) for pattern, _ in training.rates)]:
        if not fnmatch.filter(all_names, pattern):
            raise ConfigError(
                f"{kind} pattern {pattern!r} matches no parameter; nearest is {nearest(pattern, all_names)!r}"
            )
    merged: dict[str, list[int]] = {}
    for _, parts in contributions:
        for name, total, trained in parts:
            row = merged.setdefault(name, [0, 0])
            row[0], row[1] = row[0] + total, row[1] + trained
    return [(name, total, trained) for name, (total, trained) in merged.items()]


def freeze(chunks: list[VisionLanguageModel], training: Training, topology: Topology) -> list[Part]:
    """`freeze_local` on all ranks of this model replica, and the table of what trains."""
    gathered: list = [None] * topology.mp_group.size()
    dist.all_gather_object(gathered, freeze_local(chunks, training, topology), group=topology.mp_group)
    return merge_parts(gathered, training)


def _part(name: str) -> str:
    if name.endswith(ADAPTERS):
        return "language_model.lora"
    pieces = name.split(".")
    return ".".join(pieces[:2]) if pieces[0] == "language_model" else pieces[0]


def format_trainable(table: list[Part]) -> str:
    """The table of what trains, as printed at the start of a run."""
    rows = [*table, ("total", sum(r[1] for r in table), sum(r[2] for r in table))]
    lines = [f"{'part':<34}{'parameters':>16}{'trainable':>16}"]
    lines += [f"{name:<34}{total:>16,}{trained:>16,}" for name, total, trained in rows]
    return "\n".join(lines)
