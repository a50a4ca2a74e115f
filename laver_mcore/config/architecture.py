"""Sections of a recipe that say what the model is: decoder, visual path, attention."""

import fnmatch
from dataclasses import dataclass
from typing import Literal

from laver_mcore.config.towers import ENCODER_FREE, NONE, tower_named
from laver_mcore.config.towers.spec import TowerSpec


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Decoder: a preset's shape; any field given here wins over the preset."""

    model: str = "qwen2.5-7b"
    """Preset: tiny, qwen2.5-0.5b to 72b, qwen3-0.6b to 32b, vicuna-7b, vicuna-13b, llama2-7b, llama3.1-8b ..."""
    family: str | None = None
    """Decoder family: qwen2, qwen3, llama, or what an installed package registers; the preset's where not given."""
    num_layers: int | None = None
    """Decoder layers."""
    hidden_size: int | None = None
    """Width D of the decoder."""
    ffn_hidden_size: int | None = None
    """Width of the SwiGLU MLP."""
    num_attention_heads: int | None = None
    """Query heads."""
    num_query_groups: int | None = None
    """Key/value heads (grouped-query attention)."""
    kv_channels: int | None = None
    """Width of one attention head; hidden_size / num_attention_heads where not given."""
    vocab_size: int | None = None
    """Vocabulary before padding; the tokenizer's where neither preset nor recipe gives it."""
    make_vocab_size_divisible_by: int = 128
    """The vocabulary is padded to a multiple of this times the tensor-parallel size."""
    untie_embeddings_and_output_weights: bool | None = None
    """Whether the LM head has weights of its own."""
    rotary_base: float | None = None
    """Base of the rotary frequencies."""
    rope_scaling: tuple[float, float, float, int] | None = None
    """Llama 3.1's scaling: factor, low and high frequency factor, positions before; none where not given."""
    mrope_section: tuple[int, int, int] | None = None
    """Rotary bands for (t, row, column), summing to half the head width; the pure 2D split where not given."""
    mrope_split: Literal["contiguous", "interleaved"] = "interleaved"
    """How these bands lie: one axis after the other (Qwen2-VL; columns get the slow half), or in turns (Qwen3-VL)."""
    norm_epsilon: float | None = None
    """Epsilon of RMSNorm."""
    init_method_std: float = 0.02
    """Standard deviation of random weights."""
    lora_rank: int = 0
    """Rank of LoRA adapters on the decoder's linear layers, whose own weights are frozen then; 0 is no LoRA."""
    lora_alpha: float = 16.0
    """An adapter's output counts lora_alpha / lora_rank times."""
    lora_dropout: float = 0.0
    """Dropout of an adapter's input."""
    lora_targets: tuple[str, ...] = ("linear_*",)
    """Patterns of what has adapters: Megatron's layers (linear_qkv) or Hugging Face's projections (q_proj)."""
    attention_dropout: float = 0.0
    """Only 0 is supported: the mixed-attention kernels have no dropout."""

    @property
    def adapted_layers(self) -> dict[str, tuple[int, ...]]:
        """Kinds of layers that have adapters -> which of their `PROJECTIONS` do."""
        if not self.lora_rank:
            return {}
        found = {
            layer: tuple(i for i, name in enumerate(names) if self._is_target(layer) or self._is_target(name))
            for layer, names in PROJECTIONS.items()
        }
        return {layer: indices for layer, indices in found.items() if indices}

    def _is_target(self, name: str) -> bool:
        return any(fnmatch.fnmatchcase(name, pattern) for pattern in self.lora_targets)

    def projection_parts(self, layer: str) -> tuple[int, ...]:
        """How the rows of a layer's matrix (of a key group, for linear_qkv) divide among its `PROJECTIONS`."""
        if layer != "linear_qkv":
            return (1,) * len(PROJECTIONS[layer])
        assert self.num_attention_heads and self.num_query_groups
        return self.num_attention_heads // self.num_query_groups, 1, 1


PROJECTIONS = {
    "linear_qkv": ("q_proj", "k_proj", "v_proj"),
    "linear_proj": ("o_proj",),
    "linear_fc1": ("gate_proj", "up_proj"),
    "linear_fc2": ("down_proj",),
}
"""Megatron's linear layers of a decoder layer -> Hugging Face's projections that lie in their matrix."""


@dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """Visual path: a transformers tower at fixed resolution, or encoder-free patches."""

    vision: str = "siglip"
    """Visual path: none (text alone), encoder-free, siglip (SigLIP2 too), clip, dinov2, aimv2, qwen2-vl, qwen2.5-vl."""
    vision_path: str | None = None
    """Hugging Face directory with the tower's config, weights and preprocessor_config.json."""
    vision_random_init: bool = False
    """Start the tower from random weights; its directory then needs no weights."""
    vision_layer: int = -1
    """Which hidden state feeds the connector: -1 the last, -2 the one before (LLaVA's choice for CLIP)."""
    vision_select: Literal["patch", "cls_patch"] = "patch"
    """Whether a CLS token is dropped (patch) or kept."""
    image_size: int = 384
    """Side in pixels of the square input, encoder-free path only (a tower's own settings decide otherwise)."""
    patch_size: int = 16
    """Side in pixels of one patch, encoder-free path only."""
    min_pixels: int | None = None
    """Native resolution: images of fewer pixels are scaled up; preprocessor_config.json's bound where not given."""
    max_pixels: int | None = None
    """Native resolution: images of more pixels are scaled down; preprocessor_config.json's bound where not given."""
    connector_hidden_size: int | None = None
    """Inner width of the connector's MLP; the decoder's width where not given."""
    normalize_visual_tokens: bool | None = None
    """Visual tokens of unit length behind the connector; what the objective wants (victor: yes) where not given."""

    @property
    def tower(self) -> TowerSpec | None:
        """The tower that encodes images; None for text alone and for patches that the connector embeds."""
        return None if self.vision in (NONE, ENCODER_FREE) else tower_named(self.vision)

    @property
    def is_native(self) -> bool:
        """Whether images keep their shape on their way into a tower."""
        return self.tower is not None and self.tower.native is not None

    @property
    def is_encoder_free(self) -> bool:
        return self.vision == ENCODER_FREE

    @property
    def has_images(self) -> bool:
        return self.vision != NONE


@dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    """What a token sees, and where it stands: in every stage, whatever the objective."""

    mixed_attention: bool = True
    """Visual tokens of an image see each other both ways; off is causal."""
    rope_2d: bool = True
    """Visual tokens have (row, column) positions; off is 1D RoPE."""
