"""Parameters by their global names: the same name for the same weight under every parallel layout."""

import fnmatch
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist

from laver_mcore.config.checks import ConfigError
from laver_mcore.config.load import nearest
from laver_mcore.model.laver import LaverModel
from laver_mcore.parallel import Topology

EMBEDDING = "language_model.embedding.word_embeddings.weight"
_OUTPUT = "language_model.output_layer.weight"


@dataclass(frozen=True, kw_only=True)
class NamedParameter:
    """One parameter of this rank. `owned` is true on exactly one of the ranks that hold the same numbers."""

    name: str
    parameter: torch.nn.Parameter
    sharded: bool
    owned: bool


def named_parameters(chunks: list[LaverModel], topology: Topology) -> Iterator[NamedParameter]:
    """Every parameter of this rank's chunks with its global name (layers counted over the whole model)."""
    for chunk in chunks:
        layers = [layer.layer_number - 1 for layer in chunk.decoder.layers]
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


def unwrap(model: torch.nn.Module) -> LaverModel:
    """The `LaverModel` inside Megatron's data-parallel wrapper."""
    while not isinstance(model, LaverModel):
        model = model.module
    return model


def freeze(chunks: list[LaverModel], patterns: tuple[str, ...], topology: Topology) -> list[tuple[str, int, int]]:
    """Let only the parameters train whose global name matches one of `patterns`.

    Returns (part of the model, parameters, of which trainable), counted once over all ranks. Raises `ConfigError`
    for a pattern that matches nothing.
    """
    counts: dict[str, list[int]] = {}
    names = []
    for item in named_parameters(chunks, topology):
        trainable = any(fnmatch.fnmatchcase(item.name, pattern) for pattern in patterns)
        item.parameter.requires_grad_(trainable)
        names.append(item.name)
        if item.owned:
            part = counts.setdefault(_part(item.name), [0, 0])
            part[0] += item.parameter.numel()
            part[1] += item.parameter.numel() if trainable else 0
    gathered: list = [None] * topology.mp_group.size()
    dist.all_gather_object(gathered, (names, counts), group=topology.mp_group)
    all_names = sorted({name for rank_names, _ in gathered for name in rank_names})
    for pattern in patterns:
        if not fnmatch.filter(all_names, pattern):
            raise ConfigError(
                f"trainable pattern {pattern!r} matches no parameter; nearest is {nearest(pattern, all_names)!r}"
            )
    table: dict[str, list[int]] = {}
    for _, rank_counts in gathered:
        for part_name, (total, trained) in rank_counts.items():
            row = table.setdefault(part_name, [0, 0])
            row[0], row[1] = row[0] + total, row[1] + trained
    return [(part_name, *row) for part_name, row in table.items()]  # type: ignore[misc]


def _part(name: str) -> str:
    pieces = name.split(".")
    return ".".join(pieces[:2]) if pieces[0] == "language_model" else pieces[0]


def format_trainable(table: list[tuple[str, int, int]]) -> str:
    """The table of what trains, as printed at the start of a run."""
    rows = [*table, ("total", sum(r[1] for r in table), sum(r[2] for r in table))]
    lines = [f"{'part':<34}{'parameters':>16}{'trainable':>16}"]
    lines += [f"{name:<34}{total:>16,}{trained:>16,}" for name, total, trained in rows]
    return "\n".join(lines)
