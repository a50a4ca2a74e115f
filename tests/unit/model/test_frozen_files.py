"""Files of a frozen encoder as people have them: every tensor accounted for as a tower's, sizes compared."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from unit.model.test_frozen_encoders import MODELS, RADIO
from unit.model.test_tower_files import FAULTS

from laver_mcore.config.errors import ConfigError
from laver_mcore.config.targets import TargetEncoder
from laver_mcore.data.errors import DataError
from laver_mcore.data.images.processors import FixedImageProcessor
from laver_mcore.data.images.target_pixels import TargetProcessor
from laver_mcore.model.frozen_encoders import build_frozen_encoder
from laver_mcore.model.vision_encoders import read_sizes
from laver_mcore.shapes.frozen import input_side

# Faults of weights, as of a tower's; those of config.json's values are each model's own.
OF_WEIGHTS = {
    name: fault
    for name, fault in FAULTS.items()
    if "config" not in name
    and name not in ("registers", "another architecture", "no patch", "hidden_size text")
}


def unknown(folder, kind, tensors, config):
    part = {"sam": "vision_encoder.", "depth_anything": "backbone."}.get(kind, "")
    save_file(tensors | {f"{part}layers.9.weight": torch.zeros(2)}, folder / "model.safetensors")
    return f"{part}layers.9.weight"


OF_WEIGHTS["a tensor that nobody asks for"] = (
    unknown,
    r"model\.safetensors: TENSOR has no place in the vision tower",
)


@pytest.fixture(scope="module", params=["sam", "depth_anything", "radio"])
def published(request, tmp_path_factory):
    """(kind, its tensors, its config.json)"""
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "radio":
        auto = {"AutoConfig": "radio_code.Config", "AutoModel": "radio_code.Model"}
        tensors = {"projection.weight": torch.randn(10, 3, 16, 16), "projection.bias": torch.zeros(10)}
        return "radio", tensors, {"model_type": "tiny_radio", "auto_map": auto}
    MODELS[request.param]().save_pretrained(folder)
    return (
        request.param,
        load_file(folder / "model.safetensors"),
        json.loads((folder / "config.json").read_text()),
    )


@pytest.mark.parametrize(("fault", "words"), OF_WEIGHTS.values(), ids=OF_WEIGHTS)
def test_a_fault_is_one_line(published, fault, words, tmp_path):
    kind, tensors, settings = published
    (tmp_path / "config.json").write_text(json.dumps(settings))
    (tmp_path / "radio_code.py").write_text(RADIO)
    name = fault(tmp_path, kind, tensors, settings)
    target = TargetEncoder(kind=kind, path=str(tmp_path), width=10, remote_code=True)
    with pytest.raises(ConfigError) as caught:
        build_frozen_encoder(target, dtype=torch.float32)
    assert re.search(words.replace("TENSOR", re.escape(name or "")), str(caught.value))
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)


SENSELESS = {
    "no JSON": "{",
    "a list": "[]",
    "size is text": {"size": {"height": "x"}},
    "size is no pixel": {"size": {"height": -3}},
    "no filter": {"resample": 99},
    "std null": {"image_std": None},
    "std of zero": {"image_std": [0, 0, 0]},
}


@pytest.mark.parametrize("content", SENSELESS.values(), ids=SENSELESS)
def test_a_senseless_processor_is_one_line(content, tmp_path):
    processor = {"image_processor_type": "BitImageProcessor", "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    text = content if isinstance(content, str) else json.dumps(processor | {"do_normalize": True} | content)
    (tmp_path / "preprocessor_config.json").write_text(text)
    target = TargetEncoder(kind="dinov2", path=str(tmp_path))
    with pytest.raises((ConfigError, DataError), match=r"preprocessor_config\.json: ") as caught:
        TargetProcessor(tmp_path, tower=None, image_size=input_side(target))
    assert "\n" not in str(caught.value)


def directory(folder, model_type, side, processor, name):
    settings = {"model_type": model_type, "image_size": side, "patch_size": 14}
    (folder / "config.json").write_text(json.dumps(settings))
    pixels = {"image_processor_type": name, "size": {"height": processor, "width": processor}}
    pixels |= {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "resample": 3, "do_resize": True}
    (folder / "preprocessor_config.json").write_text(json.dumps(pixels))
    return folder


# Model, image_size of its config.json, size of its processor -> whether they go together.
SIZES = {
    "the same": ("siglip_vision_model", 224, 224, True),
    "a larger processor": ("siglip_vision_model", 224, 384, False),
    "a smaller processor": ("siglip_vision_model", 384, 224, False),
    "a size as large as transformers takes where none is given": ("siglip_vision_model", None, 224, True),
    "DINOv2 takes any": ("dinov2", 518, 224, True),
}


@pytest.mark.parametrize(("model_type", "side", "processor", "fits"), SIZES.values(), ids=SIZES)
def test_a_processors_size_against_its_encoders(model_type, side, processor, fits, tmp_path):
    """As a tower, and as a frozen encoder."""
    name = "SiglipImageProcessor" if model_type.startswith("siglip") else "BitImageProcessor"
    directory(tmp_path, model_type, side, processor, name)
    if side is None:
        settings = {"model_type": model_type, "patch_size": 16}
        (tmp_path / "config.json").write_text(json.dumps(settings))
    target = TargetEncoder(kind=model_type.split("_")[0], path=str(tmp_path))
    settings = json.loads((tmp_path / "preprocessor_config.json").read_text()) | {"do_center_crop": False}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    if fits:
        assert FixedImageProcessor(tmp_path, **read_sizes(tmp_path)).height == processor == input_side(target)
        return
    wanted = rf"preprocessor_config\.json.* makes images of {processor} x {processor} pixels"
    for use in (
        lambda: FixedImageProcessor(tmp_path, **read_sizes(tmp_path)),
        lambda: input_side(target),
    ):
        with pytest.raises((ConfigError, DataError), match=wanted) as caught:
            use()
        assert "config.json" in str(caught.value)
        assert str(side) in str(caught.value)
        assert "\n" not in str(caught.value)


def test_an_asked_size_that_an_encoder_cannot_take(tmp_path):
    directory(tmp_path, "siglip_vision_model", 224, 224, "SiglipImageProcessor")
    target = TargetEncoder(kind="siglip", path=str(tmp_path), image_size=336)
    with pytest.raises(
        ConfigError, match="target_image_size makes images of 336 x 336 pixels, but the siglip"
    ):
        input_side(target)


@pytest.mark.parametrize("sizes", [{"patch_size": 0}, {"patch_size": "x"}, {"image_size": [1, 2]}])
def test_sizes_that_are_no_pixels(sizes, tmp_path):
    settings = {"model_type": "siglip_vision_model", "patch_size": 16, **sizes}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ConfigError, match=r"config\.json: .*") as caught:
        read_sizes(tmp_path)
    assert "\n" not in str(caught.value)
