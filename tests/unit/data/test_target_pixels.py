"""A frozen encoder's pixels against transformers' processors: the tower's part of the image, the encoder's own rest."""

import numpy as np
import pytest
import torch
from corpora import picture
from PIL import Image
from processors import CLIP, CONFIGS, HALF, IMAGENET, square

from laver_mcore.data.errors import DataError
from laver_mcore.data.images.processors import FixedImageProcessor, PatchImageProcessor, pillow_class
from laver_mcore.data.images.target_pixels import TargetProcessor, view_of

DPT = {"image_processor_type": "DPTImageProcessor", "size": square(70), "resample": 3, **IMAGENET}
PICTURES = [picture(120, 90, seed=1), picture(64, 200, seed=2), picture(70, 70, seed=3)]


def tower(name):
    return FixedImageProcessor(CONFIGS[name], patch_size=14)


@pytest.mark.parametrize("resample", [2, 3])
@pytest.mark.parametrize(
    "beside", [None, "siglip", PatchImageProcessor(image_size=28, patch_size=14)], ids=str
)
def test_beside_a_tower_that_sees_whole_images_pixels_are_the_processors_own(beside, resample):
    config = DPT | {"resample": resample}
    beside = tower(beside) if isinstance(beside, str) else beside
    own = pillow_class("DPTImageProcessor").from_dict({**config, "keep_aspect_ratio": False})
    found = TargetProcessor(config, tower=beside, image_size=70)(PICTURES)
    torch.testing.assert_close(
        found, torch.cat([own(p, return_tensors="pt")["pixel_values"] for p in PICTURES])
    )
    assert view_of(beside) == "whole"


@pytest.mark.parametrize("image", PICTURES, ids=lambda image: str(image.size))
def test_beside_clip_an_encoder_sees_what_clip_sees(image):
    """With CLIP's own settings the pixels are CLIP's, up to the rounding of the size before the crop."""
    beside = tower("clip")
    found = TargetProcessor(CONFIGS["clip"], tower=beside, image_size=336)([image])[0]
    (wanted,) = beside([image])
    assert (found - wanted).abs().mean() < 0.02
    mirrored = TargetProcessor(CONFIGS["clip"], tower=None, image_size=336)([image])[0]
    if image.width != image.height:
        assert (mirrored - wanted).abs().mean() > 0.1


def test_the_part_is_in_the_middle():
    """A ramp of columns keeps the middle third of a picture three times as wide as high."""
    ramp = Image.fromarray(np.tile(np.arange(240, dtype=np.uint8), (80, 1))).convert("RGB")
    processor = TargetProcessor(
        DPT | {"image_mean": [0.0] * 3, "image_std": [1.0] * 3}, tower=tower("clip"), image_size=80
    )
    assert processor.view(240, 80) == pytest.approx((80, 0, 160, 80))
    assert processor.view(80, 240) == pytest.approx((0, 80, 80, 160))
    columns = processor([ramp])[0, 0].mean(0) * 255
    assert columns.numpy() == pytest.approx(np.arange(80, 160), abs=0.6)


@pytest.mark.parametrize(("values", "name"), [(HALF, "HALF"), (CLIP, "CLIP"), (IMAGENET, "IMAGENET")])
def test_normalisation_is_the_encoders_own(values, name):
    grey = Image.new("RGB", (30, 30), (51, 102, 204))
    found = TargetProcessor(DPT | values, tower=tower("siglip"), image_size=28)([grey])
    wanted = [
        (v / 255 - m) / s
        for v, m, s in zip((51, 102, 204), values["image_mean"], values["image_std"], strict=True)
    ]
    torch.testing.assert_close(found[0, :, 3, 5], torch.tensor(wanted))


def test_no_image_is_an_empty_batch():
    assert TargetProcessor(DPT, tower=None, image_size=42)([]).shape == (0, 3, 42, 42)


def test_sam_is_known_and_others_are_named():
    sam = {
        "image_processor_type": "SamImageProcessor",
        "size": {"longest_edge": 1024},
        "resample": 2,
        **IMAGENET,
    }
    assert TargetProcessor(sam, tower=None, image_size=64)(PICTURES[:1]).shape == (1, 3, 64, 64)
    with pytest.raises(DataError, match="'ViTImageProcessor' is not supported"):
        TargetProcessor({"image_processor_type": "ViTImageProcessor"}, tower=None, image_size=64)


def test_fingerprints_tell_everything_apart():
    made = [
        TargetProcessor(config, tower=beside, image_size=side).fingerprint()
        for config in (DPT, DPT | {"resample": 2}, DPT | HALF)
        for beside in (None, tower("clip"), tower("dinov2"))
        for side in (28, 42)
    ]
    assert len(set(made)) == len(made)
