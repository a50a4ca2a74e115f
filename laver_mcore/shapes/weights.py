"""Every weight of the model from the recipe alone: name, shape, place in the pipeline, and what it multiplies.

Names are those of the run under Megatron's local layers; Transformer Engine calls the norms of a layer otherwise.
"""

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from laver_mcore.config.decoders import family_named
from laver_mcore.config.schema import AddedWeight, Config, ModelConfig, VisionConfig
from laver_mcore.config.towers.spec import TowerShape
from laver_mcore.config.trainable import trains
from laver_mcore.shapes.frozen import frozen_entries, frozen_shape
from laver_mcore.shapes.towers import tower_shape, tower_weights

EMBEDDING = "language_model.embedding.word_embeddings.weight"
HEAD = "language_model.output_layer.weight"
LAYERS = "language_model.decoder.layers"
TOWER = "vision_encoder.tower."

Place = Literal["first", "layer", "last"]


@dataclass(frozen=True, kw_only=True)
class Weight:
    """One parameter, whole. `rows` names the rows that a matrix is multiplied with, None for what is no matrix."""

    name: str
    shape: tuple[int, ...]
    trains: bool
    place: Place
    layer: int = -1
    """Decoder layer, counted over the whole model; -1 elsewhere."""
    split: bool = False
    """Whether tensor parallelism cuts it."""
    rows: Literal["patches", "visual", "decoder", "latent", "logits"] | None = None
    uses: int = 1
    """How often each of these rows is multiplied with it."""
    averaged: bool = False
    """Whether a teacher keeps an average of it; one that does not train is its own average."""

    @property
    def size(self) -> int:
        """Number of parameters."""
        return math.prod(self.shape)


def padded_vocab(vocab_size: int, config: Config) -> int:
    """The vocabulary as the ranks hold it: padded so that tensor parallelism divides it."""
    multiple = config.model.make_vocab_size_divisible_by * config.parallel.tensor_model_parallel_size
    return -(-vocab_size // multiple) * multiple


def list_weights(config: Config, vocab_size: int) -> tuple[Weight, ...]:
    """All weights in the order of the forward pass: tower, connector, embedding, layers, heads; an objective's too.

    A tied embedding appears once. `vocab_size` is the one before padding; the weights are padded.
    """
    teacher = config.objective.teacher(config)
    return _list_weights(
        config.model,
        config.vision,
        config.objective.parameters(config),
        config.train.trainable,
        teacher.averaged if teacher is not None else (),
        padded_vocab(vocab_size, config),
    )


@functools.lru_cache(maxsize=16)
def _list_weights(
    model: ModelConfig,
    vision: VisionConfig,
    added: tuple[AddedWeight, ...],
    trainable: tuple[str, ...],
    averaged: tuple[str, ...],
    vocabulary: int,
) -> tuple[Weight, ...]:
    found = []
    for name, shape, rest in _entries(model, vision, added, vocabulary):
        trains = _matches(name, trainable, model.lora_rank > 0)
        found.append(
            Weight(
                name=name, shape=shape, trains=trains, averaged=trains and name.startswith(averaged), **rest
            )
        )
    return tuple(found)


@functools.lru_cache(maxsize=4096)
def _matches(name: str, patterns: tuple[str, ...], lora: bool) -> bool:
    return trains(name, patterns, lora)


def _entries(
    model: ModelConfig, vision: VisionConfig, added: tuple[AddedWeight, ...], vocabulary: int
) -> Iterator[tuple[str, tuple[int, ...], dict]]:
    assert model.hidden_size and model.num_layers
    width = model.hidden_size
    inner = vision.connector_hidden_size or width
    tower = tower_shape(vision)
    first: dict = dict(place="first")
    connector = []
    if tower is not None:
        for name, shape, rows in tower_weights(tower):
            yield f"{TOWER}{name}", shape, dict(rows=rows, **first)
        connector = [(inner, tower.output_width), (width, inner)]
    elif vision.is_encoder_free:
        connector = [(inner, 3 * vision.patch_size**2), (inner, inner), (width, inner)]
    for i, shape in enumerate(connector):
        yield f"connector.layers.{2 * i}.weight", shape, dict(rows="visual", **first)
        yield f"connector.layers.{2 * i}.bias", shape[:1], first
    yield from _added(added, "first")
    yield EMBEDDING, (vocabulary, width), dict(split=True, **first)
    for layer in range(model.num_layers):
        for name, shape, rest in _decoder_layer(model):
            yield f"{LAYERS}.{layer}.{name}", shape, dict(place="layer", layer=layer, **rest)
            for end, adapter, cut in _adapter(model, name, shape):
                kind = dict(place="layer", layer=layer, rows="decoder", split=cut)
                yield f"{LAYERS}.{layer}.{name.removesuffix('weight')}{end}", adapter, kind
    yield "language_model.decoder.final_layernorm.weight", (width,), dict(place="last")
    if model.untie_embeddings_and_output_weights:
        yield HEAD, (vocabulary, width), dict(place="last", split=True, rows="logits")
    yield from _added(added, "last")


def target_tower(config: Config) -> TowerShape | None:
    """The frozen encoder that works beside the model to give the recipe's objective its targets, if one does."""
    target = config.objective.target_encoder()
    return None if target is None or target.cache is not None else frozen_shape(target)


def frozen_tower(tower: TowerShape) -> tuple[Weight, ...]:
    """The weights of a tower that stands beside the model and never trains."""
    kind: dict = dict(trains=False, place="first")
    return tuple(
        Weight(name=TOWER + name, shape=shape, **kind | dict(rows=rows))
        for name, shape, rows in frozen_entries(tower)
    )


def _added(added: tuple[AddedWeight, ...], place: Place) -> Iterator[tuple[str, tuple[int, ...], dict]]:
    for weight in added:
        if weight.place == place:
            rows = dict(rows="latent", uses=weight.uses) if weight.uses else {}
            yield weight.name, weight.shape, dict(place=place, **rows)


def _adapter(
    model: ModelConfig, name: str, shape: tuple[int, ...]
) -> Iterator[tuple[str, tuple[int, int], bool]]:
    """(name, shape, whether tensor parallelism cuts it) of the two matrices beside a layer's own, if it has any."""
    layer = name.removesuffix(".weight").rpartition(".")[2]
    if layer not in model.adapted_layers or not name.endswith(".weight"):
        return
    adapted, parts = model.adapted_layers[layer], model.projection_parts(layer)
    rows_cut = len(parts) > 1
    yield "lora_a", (len(adapted) * model.lora_rank, shape[1]), not rows_cut
    rows = shape[0] // sum(parts) * sum(parts[i] for i in adapted)
    yield "lora_b", (rows, model.lora_rank), rows_cut


def _decoder_layer(model: ModelConfig) -> Iterator[tuple[str, tuple[int, ...], dict]]:
    assert model.hidden_size and model.ffn_hidden_size and model.kv_channels
    assert model.num_attention_heads and model.num_query_groups
    width, ffn, family = model.hidden_size, model.ffn_hidden_size, family_named(model.family)
    queries = model.num_attention_heads * model.kv_channels
    qkv = queries + 2 * model.num_query_groups * model.kv_channels
    matrix: dict = dict(split=True, rows="decoder")
    yield "input_layernorm.weight", (width,), {}
    yield "self_attention.linear_qkv.weight", (qkv, width), matrix
    if family.qkv_bias:
        yield "self_attention.linear_qkv.bias", (qkv,), dict(split=True)
    if family.qk_norm:
        yield "self_attention.q_layernorm.weight", (model.kv_channels,), {}
        yield "self_attention.k_layernorm.weight", (model.kv_channels,), {}
    yield "self_attention.linear_proj.weight", (width, queries), matrix
    yield "pre_mlp_layernorm.weight", (width,), {}
    yield "mlp.linear_fc1.weight", (2 * ffn, width), matrix
    yield "mlp.linear_fc2.weight", (width, ffn), matrix
