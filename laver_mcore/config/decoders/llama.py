"""Llama 2 (arXiv 2307.09288), Vicuna 1.5 on it, Llama 3 and 3.1 (arXiv 2407.21783): no biases at all."""

from typing import Any

from laver_mcore.config.decoders.family import DecoderFamily

_LLAMA: dict[str, Any] = dict(untie_embeddings_and_output_weights=True, norm_epsilon=1e-5)
_7B: dict[str, Any] = dict(
    num_layers=32,
    hidden_size=4096,
    ffn_hidden_size=11008,
    num_attention_heads=32,
    num_query_groups=32,
    vocab_size=32000,
    rotary_base=1e4,
    **_LLAMA,
)
_13B: dict[str, Any] = dict(
    num_layers=40,
    hidden_size=5120,
    ffn_hidden_size=13824,
    num_attention_heads=40,
    num_query_groups=40,
    vocab_size=32000,
    rotary_base=1e4,
    **_LLAMA,
)
_8B: dict[str, Any] = dict(
    num_layers=32,
    hidden_size=4096,
    ffn_hidden_size=14336,
    num_attention_heads=32,
    num_query_groups=8,
    vocab_size=128256,
    rotary_base=5e5,
    **_LLAMA,
)

LLAMA = DecoderFamily(
    name="llama",
    model_type="llama",
    architecture="LlamaForCausalLM",
    sizes={
        "llama2-7b": _7B,
        "llama2-13b": _13B,
        "vicuna-7b": _7B,
        "vicuna-13b": _13B,
        "llama3-8b": _8B,
        "llama3.1-8b": {**_8B, "rope_scaling": (8.0, 1.0, 4.0, 8192)},
    },
    scales_rope=True,
    chat_template="vicuna",  # Llama 3's tokenizers bring their own
    max_positions=131072,
    exported=dict(attention_bias=False, mlp_bias=False),
)
