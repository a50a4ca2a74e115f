"""The one table of names between Hugging Face's decoders and ours, and the fusing with it.

    model.layers.N.self_attn.{q,k,v}_proj.*    language_model.decoder.layers.N.self_attention.linear_qkv.*
    model.layers.N.mlp.{gate,up}_proj.weight   language_model.decoder.layers.N.mlp.linear_fc1.weight

All functions take and give whole tensors, unsharded and (on Hugging Face's side) without vocabulary padding.
Shapes: D width, H query heads, G key/value groups, C channels of a head, F inner width of the MLP,
V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from laver_mcore.config.decoders import family_named
from laver_mcore.config.decoders.family import Fusion, Name
from laver_mcore.config.errors import ConfigError
from laver_mcore.config.schema import ModelConfig

EMBEDDING = "language_model.embedding.word_embeddings.weight"
OUTPUT = "language_model.output_layer.weight"
LAYERS = "language_model.decoder.layers."

# Ours -> Hugging Face's, and how several of theirs make one of ours.
_MODEL: tuple[Name, ...] = (
    (EMBEDDING, ("model.embed_tokens.weight",), "vocabulary"),
    ("language_model.decoder.final_layernorm.weight", ("model.norm.weight",), "none"),
    (OUTPUT, ("lm_head.weight",), "vocabulary"),
)

# Transformer Engine fuses a norm into the matrix behind it; checkpoints use its names in any case.
_FUSED_NORMS = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}
_SEPARATE_NORMS = {separate: fused for fused, separate in _FUSED_NORMS.items()}


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One weight under both names: `ours` is one tensor, `theirs` the tensors that make it up, in order."""

    ours: str
    theirs: tuple[str, ...]
    fusion: Fusion
    layer: int | None = None


def entries(config: ModelConfig) -> list[Entry]:
    """The table for a decoder of this shape; tied embeddings have no LM head of their own."""
    assert config.num_layers is not None
    table = []
    for ours, theirs, fusion in _MODEL:
        if ours != OUTPUT or config.untie_embeddings_and_output_weights:
            table.append(Entry(ours=ours, theirs=theirs, fusion=fusion))
    for layer in range(config.num_layers):
        for ours, theirs, fusion in family_named(config.family).names:
            names = tuple(f"model.layers.{layer}.{name}" for name in theirs)
            table.append(Entry(ours=f"{LAYERS}{layer}.{ours}", theirs=names, fusion=fusion, layer=layer))
    return table


def canonical(name: str) -> str:
    """Our name of a parameter, whether its layer is Megatron's or Transformer Engine's."""
    for fused, separate in _FUSED_NORMS.items():
        if name.endswith(fused):
            return name.removesuffix(fused) + separate
    return name


def checkpoint_key(entry: Entry) -> str:
    """Key in a distributed checkpoint, where the layers of one weight are stacked under one key."""
    if entry.layer is None:
        return entry.ours
    rest = entry.ours.removeprefix(f"{LAYERS}{entry.layer}.")
    return LAYERS + _SEPARATE_NORMS.get(rest, rest)


def their_shapes(entry: Entry, config: ModelConfig, vocab_size: int) -> list[tuple[int, ...]]:
    """Shapes of `entry.theirs` in a decoder of this shape."""
    width, heads, groups = config.hidden_size, config.num_attention_heads, config.num_query_groups
    channels, inner = config.kv_channels, config.ffn_hidden_size
    assert width is not None
    assert inner is not None
    assert channels is not None
    assert heads is not None
    assert groups is not None
    rest = entry.ours if entry.layer is None else entry.ours.removeprefix(f"{LAYERS}{entry.layer}.")
    if entry.fusion == "vocabulary":
        return [(vocab_size, width)]
    if entry.fusion == "gate_up":
        return [(inner, width)] * 2
    if entry.fusion == "qkv":
        rows = [heads * channels, groups * channels, groups * channels]
        return [(n, width) if rest.endswith("weight") else (n,) for n in rows]
    if rest == "self_attention.linear_proj.weight":
        return [(width, heads * channels)]
    if rest.endswith(("q_layernorm.weight", "k_layernorm.weight")):
        return [(channels,)]
    return [(width, inner)] if rest == "mlp.linear_fc2.weight" else [(width,)]


def our_shape(entry: Entry, config: ModelConfig, vocab_size: int) -> tuple[int, ...]:
    """Shape of the whole tensor `entry.ours`, the vocabulary being `vocab_size` rows (padded or not)."""
    shapes = their_shapes(entry, config, vocab_size)
    return (sum(shape[0] for shape in shapes), *shapes[0][1:])


def fuse(entry: Entry, tensors: Sequence[torch.Tensor], config: ModelConfig) -> torch.Tensor:
    """Hugging Face's tensors -> our whole tensor, without vocabulary padding.

    Megatron interleaves queries, keys and values by group: the H / G query heads of group 0, its key head,
    its value head, then group 1, so that cutting the rows into equal parts gives every rank whole groups.
    """
    if entry.fusion == "qkv":
        groups = config.num_query_groups
        assert groups is not None
        grouped = [tensor.unflatten(0, (groups, -1)) for tensor in tensors]
        return torch.cat(grouped, dim=1).flatten(0, 1)
    if entry.fusion == "gate_up":
        return torch.cat(list(tensors))
    return tensors[0]


def split(
    entry: Entry, tensor: torch.Tensor, config: ModelConfig, only: Sequence[int] | None = None
) -> list[torch.Tensor]:
    """Our whole tensor -> Hugging Face's tensors (views where possible); the inverse of `fuse`.

    `only`: the tensor has the rows of these of them alone, as an adapter may.
    """
    if entry.fusion not in ("qkv", "gate_up"):
        return [tensor]
    groups = config.num_query_groups if entry.fusion == "qkv" else 1
    assert groups is not None
    parts = config.projection_parts(entry.ours.split(".")[-2])
    kept = parts if only is None else [parts[i] for i in only]
    unit = tensor.shape[0] // groups // sum(kept)
    rows = tensor.unflatten(0, (groups, -1)).split([unit * part for part in kept], dim=1)
    return [part.flatten(0, 1) for part in rows]


def with_new_rows(tensor: torch.Tensor, rows: int) -> torch.Tensor:
    """Rows for tokens that were added to the vocabulary, [V, D] -> [rows, D]: each the mean of the old ones.

    What is as likely or as large as the average token neither blinds nor floods a trained model (Hewitt, "Initializing
    new word embeddings for pretrained language models", 2021).
    """
    new = rows - tensor.shape[0]
    if new <= 0:
        return tensor
    mean = tensor.float().mean(0, keepdim=True).to(tensor.dtype)
    return torch.cat([tensor, mean.expand(new, -1)])


def pad_vocabulary(tensor: torch.Tensor, rows: int) -> torch.Tensor:
    """Append zero rows up to the padded vocabulary, [V, D] -> [rows, D]."""
    missing = rows - tensor.shape[0]
    if missing < 0:
        raise ConfigError(
            f"a vocabulary of {tensor.shape[0]} tokens does not fit into {rows} rows; raise vocab_size"
        )
    return torch.cat([tensor, tensor.new_zeros(missing, *tensor.shape[1:])]) if missing else tensor
