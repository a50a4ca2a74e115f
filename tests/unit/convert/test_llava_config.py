"""The LLaVA form of towers whose published config.json leaves out what transformers takes anyway."""

import json

import pytest

from laver_mcore.config.load import parse
from laver_mcore.convert.llava import vision_config

BARE = {"clip": ("clip_vision_model", 224, 32), "siglip": ("siglip_vision_model", 224, 16)}


@pytest.mark.parametrize("kind", BARE)
def test_sizes_that_are_not_written_are_transformers_own(tmp_path, kind):
    model_type, image_size, patch_size = BARE[kind]
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type, "hidden_size": 48}))
    argv = f"--model tiny --objective lm --vision {kind} --vision-path {tmp_path} --data-path none"
    found = vision_config(parse([*argv.split(), "--tokenizer-model", "none"])[0], num_layers=5)
    assert (found["image_size"], found["patch_size"]) == (image_size, patch_size)
    assert (found["hidden_size"], found["num_hidden_layers"], found["model_type"]) == (48, 5, model_type)
