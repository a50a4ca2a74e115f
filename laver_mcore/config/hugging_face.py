"""Decoder shapes between Hugging Face's `config.json` and ours, for every family of `decoders`."""

import json
from pathlib import Path
from typing import Any

from laver_mcore.config.decoders import family_named, family_of_type, known_families
from laver_mcore.config.decoders.family import DecoderFamily
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
_SCALING = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
"""Numbers of Llama 3.1's rotary scaling, in the order of `ModelConfig.rope_scaling`."""
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")


def read_config_json(directory: str | Path, wanted: str = "a Hugging Face directory") -> dict[str, Any]:
    """The content of a directory's config.json; `ConfigError` (absent, broken, no mapping) says to give `wanted`."""
    return read_mapping(Path(directory) / "config.json", wanted)


def read_mapping(file: Path, wanted: str) -> dict[str, Any]:
    """The content of a JSON file; `ConfigError` (absent, broken, no mapping) says to give `wanted`."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError:
        raise ConfigError(f"{file}: no such file; give {wanted}") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{file}: broken JSON ({error})") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{file}: wanted a JSON mapping, got {type(content).__name__}")
    return content


def read_shape(directory: str | Path) -> dict[str, Any]:
    """`ModelConfig` fields of the decoder in a Hugging Face directory; `ConfigError` names what is not supported."""
    file = Path(directory) / "config.json"
    config = read_config_json(directory, f"a Hugging Face directory of {_known()}")
    family = _supported_family(config, file)
    if (
        family.name == "llama"
    ):  # the first Llamas had as many key heads as queries, and nothing to say about it
        config = {"num_key_value_heads": config.get("num_attention_heads"), **config}
    missing = [name for name in _FIELDS if config.get(name) is None]
    if missing:
        raise ConfigError(f"{file}: {missing[0]} is missing; give the config.json that the weights came with")
    shape = {ours: config[theirs] for theirs, ours in _FIELDS.items()}
    shape["family"] = family.name
    shape["untie_embeddings_and_output_weights"] = not config.get("tie_word_embeddings", False)
    rope = _rope(config, file)
    shape["rotary_base"] = rope.get("rope_theta", config.get("rope_theta", 10000.0))
    _check_numbers(shape, file)
    shape["rotary_base"] = float(shape["rotary_base"])
    shape["rope_scaling"] = _rope_scaling(rope, family, file)
    channels = config.get("head_dim") or family.head_dim
    shape["kv_channels"] = channels or config["hidden_size"] // config["num_attention_heads"]
    _check_numbers(shape, file)
    return shape


def _check_numbers(shape: dict[str, Any], file: Path) -> None:
    """`ConfigError` for a setting that is no positive number, as config.json names it."""
    theirs = {ours: name for name, ours in _FIELDS.items()} | {
        "kv_channels": "head_dim",
        "rotary_base": "rope_theta",
    }
    for name in theirs.keys() & shape.keys():
        value, fraction = shape[name], name in ("norm_epsilon", "rotary_base")
        is_number = (
            isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < float("inf")
        )
        if not is_number or not (fraction or isinstance(value, int)):
            kind = "a positive number" if fraction else "a positive whole number"
            raise ConfigError(f"{file}: {theirs[name]}={value!r}, wanted {kind}")


def _known() -> str:
    return " or ".join(family.name for family in known_families().values())


def _supported_family(config: Any, file: Path) -> DecoderFamily:
    found = config.get("model_type") if isinstance(config, dict) else None
    family = family_of_type(found)
    if isinstance(config, dict):
        refused = _not_supported(config)
        if refused:
            raise ConfigError(f"{file}: {refused} is not supported (model_type={found!r})")
    if family is None:
        known = ", ".join(repr(f.model_type) for f in known_families().values())
        raise ConfigError(f"{file}: model_type={found!r} is no decoder known here, only {known}")
    return family


def _not_supported(config: dict[str, Any]) -> str | None:
    """What of a config.json no family here computes."""
    experts = next((name for name in _EXPERTS if config.get(name)), None)
    if experts or "moe" in str(config.get("model_type")):
        return "a mixture of experts" + (f" ({experts}={config[experts]})" if experts else "")
    # Qwen names a window and a flag that turns it on; others' windows have no flag.
    if config.get("use_sliding_window", config.get("sliding_window") is not None):
        return f"sliding-window attention (sliding_window={config.get('sliding_window')})"
    layers = config.get("layer_types") or []
    other = [kind for kind in layers if kind != "full_attention"] if isinstance(layers, list) else [layers]
    if other:
        return f"attention of type {min(map(str, other))}"
    if config.get("quantization_config"):
        return "a quantised model (quantization_config)"
    for name, plain in (
        ("hidden_act", "silu"),
        ("attention_bias", False),
        ("mlp_bias", False),
        ("partial_rotary_factor", 1.0),
    ):
        if config.get(name, plain) != plain:
            return f"{name}={config[name]!r}"
    return None


def _rope(config: dict[str, Any], file: Path) -> dict[str, Any]:
    # transformers 5 writes base and scaling into rope_parameters, earlier ones beside the rest and into rope_scaling.
    for name in ("rope_scaling", "rope_parameters"):
        if not isinstance(config.get(name) or {}, dict):
            raise ConfigError(f"{file}: {name} is {config[name]!r}, wanted a mapping")
    scaling = config.get("rope_scaling") or {}
    if "type" in scaling:  # its older name
        scaling = {"rope_type": scaling["type"], **scaling}
    return {**(config.get("rope_parameters") or {}), **scaling}


def _rope_scaling(rope: dict[str, Any], family: DecoderFamily, file: Path) -> tuple[float, ...] | None:
    kind = rope.get("rope_type", "default")
    if kind == "default":
        return None
    if kind != "llama3" or not family.scales_rope:
        raise ConfigError(f"{file}: rope_type={kind!r} is not supported (model_type={family.model_type!r})")
    missing = [name for name in _SCALING if name not in rope]
    if missing:
        raise ConfigError(f"{file}: rope_type='llama3' without {missing[0]}")
    for name in _SCALING:
        value = rope[name]
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
            raise ConfigError(f"{file}: {name}={value!r} of rope_type='llama3', wanted a positive number")
    return (*(float(rope[name]) for name in _SCALING[:3]), int(rope[_SCALING[3]]))


def text_config(model: ModelConfig, vocab_size: int) -> dict[str, Any]:
    """The content of a `config.json` for a decoder of this shape; the reverse of `read_shape`."""
    family = family_named(model.family)
    filled = {"vocab_size": vocab_size}
    shape = {theirs: filled.get(ours, getattr(model, ours)) for theirs, ours in _FIELDS.items()}
    scaling = {}
    if model.rope_scaling is not None:
        scaling = {
            "rope_scaling": {"rope_type": "llama3", **dict(zip(_SCALING, model.rope_scaling, strict=True))}
        }
    return {
        **shape,
        "model_type": family.model_type,
        "architectures": [family.architecture],
        "head_dim": model.kv_channels,
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        "initializer_range": model.init_method_std,
        "max_position_embeddings": family.max_positions,
        "rope_theta": model.rotary_base,
        "tie_word_embeddings": not model.untie_embeddings_and_output_weights,
        "use_cache": True,
        **scaling,
        **(family.exported or {}),
    }
