"""Qwen2 and Qwen2.5 (arXiv 2412.15115): biases on queries, keys and values."""

from typing import Any

from laver_mcore.config.decoders.family import DecoderFamily

# The larger base models have an epsilon of 1e-5, their Instruct versions, where the recipes start, this one.
_QWEN: dict[str, Any] = dict(rotary_base=1e6, norm_epsilon=1e-6)

_SIZES: dict[str, dict[str, Any]] = {
    "qwen2.5-0.5b": dict(
        num_layers=24,
        hidden_size=896,
        ffn_hidden_size=4864,
        num_attention_heads=14,
        num_query_groups=2,
        vocab_size=151936,
        untie_embeddings_and_output_weights=False,
        **_QWEN,
    ),
    "qwen2.5-1.5b": dict(
        num_layers=28,
        hidden_size=1536,
        ffn_hidden_size=8960,
        num_attention_heads=12,
        num_query_groups=2,
        vocab_size=151936,
        untie_embeddings_and_output_weights=False,
        **_QWEN,
    ),
    "qwen2.5-3b": dict(
        num_layers=36,
        hidden_size=2048,
        ffn_hidden_size=11008,
        num_attention_heads=16,
        num_query_groups=2,
        vocab_size=151936,
        untie_embeddings_and_output_weights=False,
        **_QWEN,
    ),
    "qwen2.5-7b": dict(
        num_layers=28,
        hidden_size=3584,
        ffn_hidden_size=18944,
        num_attention_heads=28,
        num_query_groups=4,
        vocab_size=152064,
        untie_embeddings_and_output_weights=True,
        **_QWEN,
    ),
    "qwen2.5-14b": dict(
        num_layers=48,
        hidden_size=5120,
        ffn_hidden_size=13824,
        num_attention_heads=40,
        num_query_groups=8,
        vocab_size=152064,
        untie_embeddings_and_output_weights=True,
        **_QWEN,
    ),
    "qwen2.5-32b": dict(
        num_layers=64,
        hidden_size=5120,
        ffn_hidden_size=27648,
        num_attention_heads=40,
        num_query_groups=8,
        vocab_size=152064,
        untie_embeddings_and_output_weights=True,
        **_QWEN,
    ),
    "qwen2.5-72b": dict(
        num_layers=80,
        hidden_size=8192,
        ffn_hidden_size=29568,
        num_attention_heads=64,
        num_query_groups=8,
        vocab_size=152064,
        untie_embeddings_and_output_weights=True,
        **_QWEN,
    ),
}

QWEN2 = DecoderFamily(
    name="qwen2",
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    sizes=_SIZES,
    qkv_bias=True,
    overrides_template=True,  # Qwen2.5's own is ChatML too, but adds a system turn where the recipe wants none
    exported=dict(use_sliding_window=False),
)
