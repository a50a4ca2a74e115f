"""Vision towers from arithmetic alone against transformers' own modules, weight by weight, on the meta device."""

import json

import pytest
from unit.model.test_native_encoders import CONFIGS

from laver_mcore.config.schema import VisionConfig
from laver_mcore.config.towers import tower_named
from laver_mcore.model.native_encoders import build_native_encoder
from laver_mcore.model.vision_encoders import build_vision_encoder
from laver_mcore.shapes.towers import tower_shape, tower_weights

# The published config.json of the towers that stand in for a missing directory, as far as it differs from defaults.
PUBLISHED = {
    "siglip": dict(model_type="siglip_vision_model", hidden_size=1152, intermediate_size=4304,
                   num_hidden_layers=27, num_attention_heads=16, image_size=384, patch_size=14),
    "clip": dict(model_type="clip_vision_model", hidden_size=1024, intermediate_size=4096, num_hidden_layers=24,
                 num_attention_heads=16, image_size=336, patch_size=14),
    "dinov2": dict(model_type="dinov2", hidden_size=1024, num_hidden_layers=24, num_attention_heads=16,
                   image_size=518, patch_size=14),
    "aimv2": dict(model_type="aimv2_vision_model", is_native=True),
    "qwen2-vl": dict(model_type="qwen2_vl", vision_config=dict(hidden_size=3584)),
    "qwen2.5-vl": dict(model_type="qwen2_5_vl", vision_config=dict(hidden_size=1280)),
}  # fmt: skip
SMALL = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, image_size=30)
SWIGLU = dict(SMALL, model_type="dinov2", use_swiglu_ffn=True, mlp_ratio=3)


def small(kind):
    return dict(SMALL, model_type=PUBLISHED[kind]["model_type"], patch_size=8)


# Kind, whether its config.json is there to be read (or the published sizes stand in), that file, `vision_layer`.
CASES = {
    **{f"{kind}_published": (kind, False, config, -1) for kind, config in PUBLISHED.items()},
    **{f"{kind}_tiny": (kind, True, config, -1) for kind, config in CONFIGS.items()},
    **{
        f"{kind}{at}": (kind, True, small(kind), at)
        for kind in ("siglip", "clip", "dinov2")
        for at in (-1, -2)
    },
    "dinov2_swiglu": ("dinov2", True, SWIGLU, -1),
    "defaults": ("clip", True, dict(model_type="clip_vision_model"), -1),
}


@pytest.mark.parametrize("name", CASES)
def test_weights_are_those_of_transformers(name, tmp_path):
    kind, given, config, layer = CASES[name]
    (tmp_path / "config.json").write_text(json.dumps(config))
    if tower_named(kind).native:
        encoder = build_native_encoder(kind, path=tmp_path, device="meta")
    else:
        encoder = build_vision_encoder(kind, path=tmp_path, layer=layer, device="meta")
    real = {key: parameter.numel() for key, parameter in encoder.tower.named_parameters()}
    path = str(tmp_path) if given else None
    shape = tower_shape(VisionConfig(vision=kind, vision_path=path, vision_layer=layer))
    listed = {key: _size(sides) for key, sides, _ in tower_weights(shape)}
    assert listed == real
    assert shape.output_width == encoder.hidden_size
    if not tower_named(kind).native:
        assert shape.fixed_tokens == encoder.num_tokens
        assert shape.prefix_tokens == encoder.num_prefix_tokens


def _size(sides):
    size = 1
    for side in sides:
        size *= side
    return size


@pytest.mark.parametrize("vision", ["none", "encoder-free"])
def test_no_tower(vision):
    assert tower_shape(VisionConfig(vision=vision)) is None
