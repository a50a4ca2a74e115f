"""Decoder shapes by name: the published sizes of every family, and the demo's tiny one."""

from dataclasses import fields, replace
from typing import Any

from laver_mcore.config.decoders import known_families
from laver_mcore.config.errors import nearest
from laver_mcore.config.schema import ModelConfig

PRESETS: dict[str, dict[str, Any]] = {
    "tiny": dict(
        family="qwen2",
        num_layers=4,
        hidden_size=128,
        ffn_hidden_size=384,
        num_attention_heads=4,
        num_query_groups=2,
        untie_embeddings_and_output_weights=False,
        rotary_base=1e4,
        norm_epsilon=1e-6,
    ),
    **{
        name: {"family": family.name, **size}
        for family in known_families().values()
        for name, size in family.sizes.items()
    },
}


def model_name(config: ModelConfig) -> str:
    """What to call a decoder that is trained: its preset, if it has that shape, or what it is."""
    preset = PRESETS.get(config.model, {})
    if preset and all(
        getattr(config, name) == value for name, value in preset.items() if name != "vocab_size"
    ):
        return config.model
    return f"{config.family} of {config.num_layers} layers, {config.hidden_size} wide"


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
