"""What exported JSON files say, value by value: each differs from its default, so that none can stand in for it."""

import json
from types import SimpleNamespace

import pytest
import torch
from sample_decoders import FAMILIES, random_decoder
from unit.model.test_native_encoders import write_directory

from laver_mcore.config.hugging_face import read_shape, text_config
from laver_mcore.config.presets import fill_from_preset
from laver_mcore.config.schema import AttentionConfig, Config, ModelConfig, VisionConfig
from laver_mcore.convert.export import _generation_config, model_config, processor_config

SHAPE = dict(
    num_layers=3,
    hidden_size=48,
    ffn_hidden_size=72,
    num_attention_heads=6,
    num_query_groups=2,
    kv_channels=10,
    norm_epsilon=3e-5,
    rotary_base=12345.0,
    init_method_std=0.07,
)
TOWER = dict(
    model_type="siglip_vision_model",
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=3,
    num_attention_heads=2,
    image_size=40,
    patch_size=8,
)
PIXELS = dict(
    image_processor_type="SiglipImageProcessor",
    size=dict(height=40, width=40),
    do_resize=True,
    resample=2,
    do_normalize=True,
    image_mean=[0.1, 0.2, 0.3],
    image_std=[0.4, 0.5, 0.6],
    do_rescale=True,
    rescale_factor=1 / 255,
)


def model(untied=True, **changes):
    return fill_from_preset(ModelConfig(**SHAPE | changes, untie_embeddings_and_output_weights=untied))


NUMBERS = (
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
    "rms_norm_eps",
)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_text_config(tied):
    said = text_config(model(untied=not tied), 77)
    assert said == {
        "num_hidden_layers": 3,
        "hidden_size": 48,
        "intermediate_size": 72,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "vocab_size": 77,
        "rms_norm_eps": 3e-5,
        "model_type": "qwen2",
        "architectures": ["Qwen2ForCausalLM"],
        "head_dim": 10,
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        "initializer_range": 0.07,
        "max_position_embeddings": 32768,
        "rope_theta": 12345.0,
        "tie_word_embeddings": tied,
        "use_cache": True,
        "use_sliding_window": False,
    }


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_text_config_is_what_transformers_reads_and_writes(tmp_path, tied):
    """Their own configuration -> ours -> theirs: the same model."""
    from transformers import Qwen2Config

    theirs = Qwen2Config(
        num_hidden_layers=3,
        hidden_size=48,
        intermediate_size=72,
        num_attention_heads=6,
        num_key_value_heads=2,
        vocab_size=77,
        rms_norm_eps=3e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 12345.0},
        tie_word_embeddings=tied,
    )
    theirs.save_pretrained(tmp_path)
    ours = fill_from_preset(ModelConfig(), read_shape(tmp_path))
    assert ours.untie_embeddings_and_output_weights == (not tied)
    again = Qwen2Config(**text_config(ours, 77))
    fields = (*NUMBERS, "rope_parameters", "tie_word_embeddings")
    assert {name: getattr(again, name) for name in fields} == {name: getattr(theirs, name) for name in fields}
    assert again.head_dim == 8


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_is_what_transformers_reads_and_writes(tmp_path, name):
    """Llama 3.1's rotary scaling and Qwen3's heads included."""
    from transformers import AutoConfig

    theirs = random_decoder(name).config
    theirs.save_pretrained(tmp_path)
    ours = fill_from_preset(ModelConfig(), read_shape(tmp_path))
    assert (ours.rope_scaling is not None) == ("3.1" in name or "3.2" in name)
    again = AutoConfig.for_model(**text_config(ours, 101))
    for field in (*NUMBERS, "head_dim", "rope_parameters", "tie_word_embeddings", "model_type"):
        assert getattr(again, field) == getattr(theirs, field), field


def test_untied_where_the_flag_is_missing(tmp_path):
    """As transformers writes it: Qwen2's default is left out."""
    numbers = dict(num_hidden_layers=3, hidden_size=48, intermediate_size=72, num_attention_heads=6)
    numbers |= dict(num_key_value_heads=2, vocab_size=77, rms_norm_eps=3e-5, model_type="qwen2")
    (tmp_path / "config.json").write_text(json.dumps(numbers))
    found = read_shape(tmp_path)
    assert found["untie_embeddings_and_output_weights"] is True
    assert (found["rotary_base"], found["kv_channels"]) == (10000.0, 8)


def recipe(untied=True, tower=None, split="interleaved", **attention):
    """Encoder-free, or with a tower from its directory."""
    vision = VisionConfig(vision="encoder-free", image_size=48, patch_size=12, connector_hidden_size=40)
    if tower is not None:
        vision = VisionConfig(vision="siglip", vision_path=str(tower), vision_layer=-2)
    shape = model(untied, mrope_section=(0, 2, 3), mrope_split=split)
    return Config(model=shape, vision=vision, attention=AttentionConfig(**attention))


@pytest.fixture
def tower(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(TOWER))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(PIXELS))
    return tmp_path


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize(("rope_2d", "mixed"), [(True, False), (False, True)], ids=["rope_2d", "mixed"])
@pytest.mark.parametrize("split", ["contiguous", "interleaved"])
def test_model_config(tied, rope_2d, mixed, split):
    config = recipe(untied=not tied, rope_2d=rope_2d, mixed_attention=mixed, split=split)
    said = model_config(config, 77, 5, torch.bfloat16)
    wanted = {
        "model_type": "laver",
        "dtype": "bfloat16",
        "tie_word_embeddings": tied,
        "vision": "encoder-free",
        "patch_size": 12,
        "connector_hidden_size": 40,
        "image_grid": [4, 4],
        "image_token_id": 5,
        "mrope_section": [0, 2, 3],
        "mrope_split": split,
        "rope_2d": rope_2d,
        "mixed_attention": mixed,
    }
    assert {name: said[name] for name in wanted} == wanted
    assert said["text_config"]["tie_word_embeddings"] == tied
    assert said["text_config"]["vocab_size"] == 77
    assert "vision_config" not in said


def test_model_config_with_a_tower(tower):
    said = model_config(recipe(tower=tower), 77, 5, torch.float32)
    assert said["vision"] == "siglip"
    assert said["vision_layer"] == -2
    assert said["image_grid"] == [5, 5]
    assert said["connector_hidden_size"] == 48  # the decoder's width where the recipe names none
    assert {name: said["vision_config"][name] for name in TOWER} == TOWER


def test_preprocessor_config(tower):
    """Sides of square and patch, or the tower's own file as it is."""
    bare, towers = processor_config(recipe()), processor_config(recipe(tower=tower))
    assert (bare["image_size"], bare["patch_size"], bare["image_grid"]) == (48, 12, [4, 4])
    assert "tower" not in bare
    assert towers["tower"] == PIXELS
    assert towers["image_grid"] == [5, 5]
    assert bare["image_processor_type"] == towers["image_processor_type"] == "LaverImageProcessor"


def test_preprocessor_config_of_a_native_tower(tmp_path):
    """The tower's file, but for the bounds that the recipe gives."""
    write_directory(tmp_path, "qwen2-vl")
    vision = VisionConfig(vision="qwen2-vl", vision_path=str(tmp_path), min_pixels=320, max_pixels=2048)
    said = processor_config(Config(model=model(), vision=vision))
    assert said["image_grid"] is None
    size = said["tower"].get("size") or {}
    found = [said["tower"].get("min_pixels", size.get("shortest_edge"))]
    found += [said["tower"].get("max_pixels", size.get("longest_edge"))]
    assert found == [320, 2048]
    assert (said["tower"]["image_mean"], said["tower"]["merge_size"]) == ([0.4, 0.5, 0.6], 2)


def test_generation_config():
    special = SimpleNamespace(end_of_turn=2, pad=3, image_pad=4)
    said = _generation_config(SimpleNamespace(special=special))
    assert (said["eos_token_id"], said["pad_token_id"], said["do_sample"]) == (2, 3, False)
