"""Hugging Face weights -> the model chunks of this rank, whatever the parallel layout."""

from collections.abc import Mapping

import torch

from laver_mcore.config.schema import ModelConfig
from laver_mcore.convert.errors import ConversionError
from laver_mcore.convert.names import (
    Entry,
    canonical,
    entries,
    fuse,
    pad_vocabulary,
    their_shapes,
    with_new_rows,
)
from laver_mcore.megatron.parallel import Topology
from laver_mcore.model.parameters import NamedParameter, named_parameters
from laver_mcore.model.sharding import shard
from laver_mcore.model.vision_language import VisionLanguageModel


def gather_theirs(
    entry: Entry, tensors_by_name: Mapping[str, torch.Tensor], config: ModelConfig, vocab_size: int
) -> list[torch.Tensor]:
    """The tensors of one entry; `ConversionError` names the first one that is missing or does not fit."""
    tensors = []
    for name, wanted in zip(entry.theirs, their_shapes(entry, config, vocab_size), strict=True):
        if name not in tensors_by_name:
            raise ConversionError(f"{name} is missing; it should be {list(wanted)}")
        tensor = tensors_by_name[name]
        if tuple(tensor.shape) != wanted:
            raise ConversionError(
                f"{name} is {list(tensor.shape)}, a decoder of this shape wants {list(wanted)}; "
                "take the model shape from the directory's config.json"
            )
        tensors.append(tensor)
    return tensors


@torch.no_grad()
def load_hf_weights(
    chunks: list[VisionLanguageModel],
    config: ModelConfig,
    vocab_size: int,
    topology: Topology,
    tensors_by_name: Mapping[str, torch.Tensor],
) -> list[str]:
    """Fill the decoder of `chunks` from whole Hugging Face tensors, cast to the model's dtype.

    `tensors_by_name` may read lazily: each tensor is asked for once per parameter made of it. `vocab_size` is
    the one before padding. Returns the names of this rank's parameters that a decoder has not (visual path, mask
    token, vision head) and that keep their values. Raises `ConversionError`.
    """
    table = {entry.ours: entry for entry in entries(config)}
    fresh = []
    for item in named_parameters(chunks, topology):
        entry = table.get(canonical(item.name))
        if entry is None:
            fresh.append(item.name)
            continue
        full = fuse(
            entry, gather_theirs(entry, tensors_by_name, config, config.vocab_size or vocab_size), config
        )
        if entry.fusion == "vocabulary":
            full = with_new_rows(full, vocab_size)
        item.parameter.copy_(_cut(full, entry, item, topology))
    return fresh


def _cut(full: torch.Tensor, entry: Entry, item: NamedParameter, topology: Topology) -> torch.Tensor:
    if not item.sharded:
        return full
    dim: int = item.parameter.partition_dim  # type: ignore[attr-defined]
    if entry.fusion == "vocabulary":
        full = pad_vocabulary(full, item.parameter.shape[0] * topology.tp_size)
    return shard(full, item.name, dim, topology.tp_rank, topology.tp_size)
