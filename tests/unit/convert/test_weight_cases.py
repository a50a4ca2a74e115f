"""Weights and configs that people have: converted to the bit, cast where asked, or refused with the tensor's name."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from unit.convert.test_hf_directories import assert_same_bits, read_model

from laver_mcore.config.errors import ConfigError
from laver_mcore.config.presets import PRESETS
from laver_mcore.convert.decoder import export_decoder, import_decoder

TIED, UNTIED = "qwen2.5-0.5b", "qwen2.5-7b"
NORM = "model.layers.1.input_layernorm.weight"
DOWN = "model.layers.0.mlp.down_proj.weight"


def write_model(path, preset=UNTIED, dtype=torch.float32, max_shard_size="5GB"):
    """A random model of the preset's head ratio and tying, two narrow layers."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    heads, groups = PRESETS[preset]["num_attention_heads"], PRESETS[preset]["num_query_groups"]
    config = Qwen2Config(
        num_hidden_layers=2,
        hidden_size=4 * heads,
        intermediate_size=24,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        vocab_size=51,
        tie_word_embeddings=not PRESETS[preset]["untie_embeddings_and_output_weights"],
    )
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(config).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter))
    model.save_pretrained(path, max_shard_size=max_shard_size)
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def edit(path, change):
    """Rewrite the tensors of a directory."""
    file = path / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def set_to(name, value):
    return lambda tensors: tensors.update({name: value(tensors)})


def cast(name, dtype):
    return set_to(name, lambda tensors: tensors[name].to(dtype))


def spoil(name, value):
    def change(tensors):
        tensors[name].view(-1)[-1] = value

    return change


HEAD = "lm_head.weight"
EMBEDDING = "model.embed_tokens.weight"
# Preset, what is done to its tensors, and the one line.
REFUSED = {
    "another head beside a tied embedding": (
        TIED,
        set_to(HEAD, lambda t: t[EMBEDDING] + 1),
        f"tie_word_embeddings is true, but {HEAD} differs",
    ),
    "one number of the head differs": (
        TIED,
        lambda t: (t.update({HEAD: t[EMBEDDING].clone()}), spoil(HEAD, 9.0)(t)),
        "differs from model.embed_tokens.weight",
    ),
    "a head of another size": (TIED, set_to(HEAD, lambda t: t[EMBEDDING][:-1].clone()), "differs from"),
    "F64": (UNTIED, cast(DOWN, torch.float64), f"{DOWN} is F64; give --dtype"),
    "NaN": (UNTIED, spoil(NORM, float("nan")), f"{NORM} holds NaN or infinity"),
    "infinity in the vocabulary": (UNTIED, spoil(EMBEDDING, float("inf")), f"{EMBEDDING} holds NaN"),
    "a shape that broadcasts": (UNTIED, set_to(NORM, lambda t: t[NORM][:1].clone()), r"is \[1\], its config"),
    "an unknown tensor": (
        UNTIED,
        set_to("model.layers.0.mlp.extra", lambda t: t[NORM].clone()),
        "has no place in a",
    ),
    "more layers than the config": (
        UNTIED,
        set_to("model.layers.2.input_layernorm.weight", lambda t: t[NORM].clone()),
        "layers.2.input_layernorm.weight has no place",
    ),
    "a scale of packed weights": (
        UNTIED,
        set_to(DOWN + "_scale_inv", lambda t: t[NORM].clone()),
        "has no place",
    ),
}
CODES = ("int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64", "bool", "complex64")
CODES += ("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu")
REFUSED |= {
    name: (UNTIED, cast(DOWN, getattr(torch, name)), f"{DOWN} is .*, codes without their scales")
    for name in CODES
}


@pytest.mark.parametrize(("preset", "change", "message"), REFUSED.values(), ids=REFUSED)
def test_refused(preset, change, message, tmp_path):
    write_model(tmp_path / "hf", preset)
    edit(tmp_path / "hf", change)
    with pytest.raises(ConfigError, match=message) as caught:
        import_decoder(tmp_path / "hf", tmp_path / "mcore")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "mcore").exists()


def test_a_head_equal_to_its_tied_embedding_is_derived(tmp_path, caplog):
    caplog.set_level("INFO")
    wanted = write_model(tmp_path / "hf", TIED)
    edit(tmp_path / "hf", set_to(HEAD, lambda t: t[EMBEDDING].clone()))
    import_decoder(tmp_path / "hf", tmp_path / "mcore")
    assert f"{len(wanted)} tensors used, 1 derived ({HEAD}), none left out" in caplog.text
    export_decoder(tmp_path / "mcore", tmp_path / "back")
    assert_same_bits(read_model(tmp_path / "back"), wanted)


def test_doubles_are_cast_where_asked(tmp_path):
    wanted = write_model(tmp_path / "hf", dtype=torch.float64)
    import_decoder(tmp_path / "hf", tmp_path / "mcore", dtype=torch.float32)
    export_decoder(tmp_path / "mcore", tmp_path / "back")
    assert_same_bits(read_model(tmp_path / "back"), {name: tensor.float() for name, tensor in wanted.items()})


def test_two_files_with_one_tensor(tmp_path):
    write_model(tmp_path / "hf", max_shard_size="20KB")
    first, second = sorted((tmp_path / "hf").glob("*.safetensors"))[:2]
    save_file(load_file(first) | load_file(second), second, metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"is in .* and in .*; which is meant"):
        import_decoder(tmp_path / "hf", tmp_path / "mcore")


CARRIED = {
    "bos_token_id": 11,
    "eos_token_id": 12,
    "pad_token_id": 13,
    "max_position_embeddings": 131_072,
    "initializer_range": 0.013,
    "attention_dropout": 0.0,
}


@pytest.mark.parametrize("generation", [True, False], ids=["generation config", "none"])
@pytest.mark.parametrize("preset", [name for name in PRESETS if name.startswith("qwen2.5")])
def test_settings_come_back(preset, generation, tmp_path):
    wanted = write_model(tmp_path / "hf", preset, torch.bfloat16)
    config = json.loads((tmp_path / "hf" / "config.json").read_text()) | CARRIED
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config))
    if not generation:
        (tmp_path / "hf" / "generation_config.json").unlink(missing_ok=True)
    import_decoder(tmp_path / "hf", tmp_path / "mcore")
    export_decoder(tmp_path / "mcore", tmp_path / "back")
    found = json.loads((tmp_path / "back" / "config.json").read_text())
    assert {name: found[name] for name in CARRIED} == CARRIED
    assert found["tie_word_embeddings"] == config["tie_word_embeddings"]
    assert (tmp_path / "back" / "generation_config.json").is_file() == generation
    assert_same_bits(read_model(tmp_path / "back"), wanted)


# A setting of config.json, its value, the one line.
CONFIGS = {
    "vocab_size null": ("vocab_size", None, "vocab_size is missing"),
    "vocab_size a word": ("vocab_size", "many", "vocab_size='many', wanted a positive whole number"),
    "layers negative": ("num_hidden_layers", -2, "num_hidden_layers=-2, wanted a positive whole number"),
    "layers true": ("num_hidden_layers", True, "num_hidden_layers=True, wanted"),
    "heads zero": ("num_attention_heads", 0, "num_attention_heads=0, wanted"),
    "width a fraction": ("hidden_size", 12.5, "hidden_size=12.5, wanted a positive whole number"),
    "epsilon a list": ("rms_norm_eps", [1e-6], r"rms_norm_eps=\[1e-06\], wanted a positive number"),
    "base a word": ("rope_parameters", {"rope_theta": "big"}, "rope_theta='big', wanted a positive number"),
    "rope a word": ("rope_parameters", "yarn", "is 'yarn', wanted a mapping"),
    "head_dim a word": ("head_dim", "x", "head_dim='x', wanted a positive whole number"),
}


@pytest.mark.parametrize(("name", "value", "message"), CONFIGS.values(), ids=CONFIGS)
def test_configs(name, value, message, tmp_path):
    write_model(tmp_path / "hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text()) | {name: value}
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=message):
        import_decoder(tmp_path / "hf", tmp_path / "mcore")
