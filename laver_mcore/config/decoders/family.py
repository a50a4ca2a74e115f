"""What a decoder family is: everything in which Qwen2.5, Llama and Qwen3 differ, as plain data.

All are the same decoder otherwise: pre-norm with RMSNorm, grouped-query attention with rotary positions, SwiGLU.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Fusion = Literal["qkv", "gate_up", "vocabulary", "none"]
"""How several of Hugging Face's tensors make one of ours."""
Name = tuple[str, tuple[str, ...], Fusion]
"""Our name of a weight, Hugging Face's names of the tensors that make it up, in order, and how."""

_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")

LAYER_NAMES: tuple[Name, ...] = (
    ("input_layernorm.weight", ("input_layernorm.weight",), "none"),
    ("self_attention.linear_qkv.weight", tuple(f"{name}.weight" for name in _QKV), "qkv"),
    ("self_attention.linear_proj.weight", ("self_attn.o_proj.weight",), "none"),
    ("pre_mlp_layernorm.weight", ("post_attention_layernorm.weight",), "none"),
    ("mlp.linear_fc1.weight", ("mlp.gate_proj.weight", "mlp.up_proj.weight"), "gate_up"),
    ("mlp.linear_fc2.weight", ("mlp.down_proj.weight",), "none"),
)
"""Weights that a layer of every family has."""
QKV_BIAS_NAMES: tuple[Name, ...] = (
    ("self_attention.linear_qkv.bias", tuple(f"{name}.bias" for name in _QKV), "qkv"),
)
QK_NORM_NAMES: tuple[Name, ...] = (
    ("self_attention.q_layernorm.weight", ("self_attn.q_norm.weight",), "none"),
    ("self_attention.k_layernorm.weight", ("self_attn.k_norm.weight",), "none"),
)


@dataclass(frozen=True, kw_only=True, eq=False)
class DecoderFamily:
    """One entry of the registry of decoders."""

    name: str
    """By which a recipe calls it, `model.family`."""
    model_type: str
    """`model_type` of its config.json."""
    architecture: str
    """Its class in transformers."""
    sizes: Mapping[str, Mapping[str, Any]]
    """Published models: preset -> fields of `ModelConfig`."""
    qkv_bias: bool = False
    """Whether queries, keys and values have biases."""
    qk_norm: bool = False
    """Whether each head's queries and keys go through RMSNorm before they are rotated."""
    scales_rope: bool = False
    """Whether config.json may ask for the rotary scaling of Llama 3.1."""
    head_dim: int | None = None
    """Width of a head where config.json does not say; hidden_size / num_attention_heads where None."""
    chat_template: str = "chatml"
    """How dialogues are written where the tokenizer brings no template: a name of `templates`, or Jinja."""
    overrides_template: bool = False
    """Whether that is so for a tokenizer with a template too."""
    max_positions: int = 32768
    """`max_position_embeddings` of an exported config.json, which computes nothing."""
    layer_names: tuple[Name, ...] = LAYER_NAMES
    """Names of the weights that its layers have beside biases and norms of queries and keys."""
    exported: Mapping[str, Any] | None = None
    """What its config.json says besides."""

    @property
    def names(self) -> tuple[Name, ...]:
        """Names of all weights of one of its layers."""
        found = list(self.layer_names)
        behind_qkv = 1 + next(i for i, (ours, _, _) in enumerate(found) if ours.endswith("linear_qkv.weight"))
        options = (*(QKV_BIAS_NAMES if self.qkv_bias else ()), *(QK_NORM_NAMES if self.qk_norm else ()))
        return (*found[:behind_qkv], *options, *found[behind_qkv:])
