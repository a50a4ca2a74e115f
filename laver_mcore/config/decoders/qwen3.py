"""Qwen3's dense models (arXiv 2505.09388): RMSNorm on queries and keys, no biases, heads of 128 channels."""

from typing import Any

from laver_mcore.config.decoders.family import DecoderFamily

_QWEN: dict[str, Any] = dict(
    num_query_groups=8, kv_channels=128, vocab_size=151936, rotary_base=1e6, norm_epsilon=1e-6
)


def _size(layers: int, width: int, inner: int, heads: int, *, tied: bool) -> dict[str, Any]:
    return dict(
        num_layers=layers,
        hidden_size=width,
        ffn_hidden_size=inner,
        num_attention_heads=heads,
        untie_embeddings_and_output_weights=not tied,
        **_QWEN,
    )


QWEN3 = DecoderFamily(
    name="qwen3",
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    sizes={
        "qwen3-0.6b": _size(28, 1024, 3072, 16, tied=True),
        "qwen3-1.7b": _size(28, 2048, 6144, 16, tied=True),
        "qwen3-4b": _size(36, 2560, 9728, 32, tied=True),
        "qwen3-8b": _size(36, 4096, 12288, 32, tied=False),
        "qwen3-14b": _size(40, 5120, 17408, 40, tied=False),
        "qwen3-32b": _size(64, 5120, 25600, 64, tied=False),
    },
    qk_norm=True,
    head_dim=128,
    max_positions=40960,
    exported=dict(attention_bias=False, use_sliding_window=False),
)
