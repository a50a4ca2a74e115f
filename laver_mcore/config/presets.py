"""Decoder shapes by name: Qwen2.5's published configurations and the demo's tiny one."""

from dataclasses import fields, replace
from typing import Any

from laver_mcore.config.errors import nearest
from laver_mcore.config.schema import ModelConfig

# The larger base models have an epsilon of 1e-5, their Instruct versions, where the recipes start, this one.
_QWEN: dict[str, Any] = dict(rotary_base=1e6, norm_epsilon=1e-6)

PRESETS: dict[str, dict[str, Any]] = {
    "tiny": dict(
        num_layers=4,
        hidden_size=128,
        ffn_hidden_size=384,
        num_attention_heads=4,
        num_query_groups=2,
        untie_embeddings_and_output_weights=False,
        rotary_base=1e4,
        norm_epsilon=1e-6,
    ),
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


def fill_from_preset(config: ModelConfig, shape: dict[str, Any] | None = None) -> ModelConfig:
    """Give every shape field that is still None its preset's value; `ValueError` for an unknown preset.

    `shape` (of a Hugging Face directory, say) takes the place of the preset.
    """
    if config.model not in PRESETS:
        raise ValueError(
            f"model={config.model!r} is no preset; did you mean {nearest(config.model, list(PRESETS))!r}? "
            f"({', '.join(PRESETS)})"
        )
    preset = PRESETS[config.model] if shape is None else shape
    missing = {
        f.name: preset[f.name] for f in fields(config) if f.name in preset and getattr(config, f.name) is None
    }
    config = replace(config, **missing)
    if config.kv_channels is None:
        assert config.hidden_size is not None
        assert config.num_attention_heads is not None
        config = replace(config, kv_channels=config.hidden_size // config.num_attention_heads)
    if config.mrope_section is None:
        assert config.kv_channels is not None
        half = config.kv_channels // 2
        config = replace(config, mrope_section=(0, half - half // 2, half // 2))
    return config
