"""Decoder shapes between Hugging Face's `config.json` (Qwen2, Qwen2.5) and ours."""

import json
from pathlib import Path
from typing import Any

from laver_mcore.config.errors import ConfigError
from laver_mcore.config.schema import ModelConfig

_FIELDS = {
    "num_hidden_layers": "num_layers",
    "hidden_size": "hidden_size",
    "intermediate_size": "ffn_hidden_size",
    "num_attention_heads": "num_attention_heads",
    "num_key_value_heads": "num_query_groups",
    "vocab_size": "vocab_size",
    "rms_norm_eps": "norm_epsilon",
}


def read_shape(directory: str | Path) -> dict[str, Any]:
    """`ModelConfig` fields of the Qwen2 decoder in a Hugging Face directory; `ConfigError` for anything
    else.
    """
    file = Path(directory) / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except OSError:
        raise ConfigError(
            f"{file}: no such file; give a Hugging Face directory of Qwen2 or Qwen2.5"
        ) from None
    except ValueError as error:
        raise ConfigError(f"{file}: broken JSON ({error})") from None
    _check_supported(config, file)
    missing = [name for name in _FIELDS if name not in config]
    if missing:
        raise ConfigError(f"{file}: {missing[0]} is missing; give the config.json that the weights came with")
    shape = {ours: config[theirs] for theirs, ours in _FIELDS.items()}
    shape["untie_embeddings_and_output_weights"] = not config.get("tie_word_embeddings", False)
    # transformers 5 writes the base into rope_parameters, earlier ones beside the rest.
    rope = config.get("rope_parameters") or {}
    shape["rotary_base"] = float(rope.get("rope_theta", config.get("rope_theta", 10000.0)))
    channels = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    return {**shape, "kv_channels": channels}


def _check_supported(config: Any, file: Path) -> None:
    found = config.get("model_type") if isinstance(config, dict) else None
    if found != "qwen2":
        raise ConfigError(f"{file}: model_type={found!r}, wanted 'qwen2' (Qwen2 and Qwen2.5 text models)")
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    unsupported = {
        "hidden_act": (config.get("hidden_act", "silu"), "silu"),
        "rope_type": (kind, "default"),
        "use_sliding_window": (bool(config.get("use_sliding_window", False)), False),
    }
    for name, (value, wanted) in unsupported.items():
        if value != wanted:
            raise ConfigError(f"{file}: {name}={value!r} is not supported, only {wanted!r}")


def text_config(model: ModelConfig, vocab_size: int) -> dict[str, Any]:
    """The content of a Qwen2 `config.json` for a decoder of this shape; the reverse of `read_shape`."""
    filled = {"vocab_size": vocab_size}
    shape = {theirs: filled.get(ours, getattr(model, ours)) for theirs, ours in _FIELDS.items()}
    return {
        **shape,
        "model_type": "qwen2",
        "architectures": ["Qwen2ForCausalLM"],
        "head_dim": model.kv_channels,
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        "initializer_range": model.init_method_std,
        "max_position_embeddings": 32768,
        "rope_theta": model.rotary_base,
        "tie_word_embeddings": not model.untie_embeddings_and_output_weights,
        "use_cache": True,
        "use_sliding_window": False,
    }
