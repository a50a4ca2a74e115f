"""The arithmetic of resizing, cropping and normalising, on numbers small enough to work out by hand."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from laver_mcore.data.errors import DataError
from laver_mcore.data.images.pixel_settings import PixelSettings, smart_resize
from laver_mcore.data.images.processors import normalise
from laver_mcore.data.images.wanted import centre_crop

SETTINGS = PixelSettings(
    resize="square",
    height=28,
    width=42,
    crop=None,
    resample="bicubic",
    scale=1 / 255,
    mean=(0.5, 0.25, 0.125),
    std=(0.5, 1.0, 2.0),
    factor=28,
    min_pixels=28 * 28,
    max_pixels=100 * 28 * 28,
)
SHORTEST = replace(SETTINGS, resize="shortest", height=224, width=224)

# Settings, (width, height) of an image -> (height, width) that it is resized to.
TARGETS = {
    "square": (SETTINGS, (640, 480), (28, 42)),
    "left alone": (replace(SETTINGS, resize="none"), (640, 480), (480, 640)),
    "wide": (SHORTEST, (640, 480), (224, 298)),  # 298.67 is cut
    "tall": (SHORTEST, (480, 640), (298, 224)),
    "even": (SHORTEST, (100, 100), (224, 224)),
    "wider than the shortest edge fits": (SHORTEST, (1000, 10), (224, 22400)),
    "native": (replace(SETTINGS, resize="native"), (100, 30), (28, 112)),  # 30 / 28 and 100 / 28, rounded
}


@pytest.mark.parametrize(("settings", "size", "wanted"), TARGETS.values(), ids=TARGETS)
def test_targets(settings, size, wanted):
    assert settings.target(*size) == wanted


@pytest.mark.parametrize(
    ("size", "bounds", "wanted"),
    [
        ((60, 50), (56 * 56, 56 * 56), (56, 56)),
        ((60, 50), (56 * 56 + 1, 10**6), (56, 84)),
        ((60, 50), (1, 56 * 56 - 1), (28, 56)),
    ],
    ids=["at both", "below the lower", "above the upper"],
)
def test_native_bounds(size, bounds, wanted):
    """60 x 50 pixels are nearest to 2 x 2 tokens of 28; beyond a bound both sides grow or shrink by one factor."""
    assert smart_resize(*size, 28, *bounds) == wanted


# Height and width of an image, of the crop -> top and left of it.
CROPS = {
    "as large": ((4, 6), (4, 6), (0, 0)),
    "even rest": ((6, 8), (4, 4), (1, 2)),
    "odd rest": ((7, 8), (4, 3), (1, 2)),
    "rest of one": ((5, 4), (4, 3), (0, 0)),
}


@pytest.mark.parametrize(("size", "crop", "corner"), CROPS.values(), ids=CROPS)
def test_the_crop_is_in_the_middle(size, crop, corner):
    from transformers.image_transforms import center_crop

    image = torch.arange(3 * size[0] * size[1]).reshape(3, *size)
    (height, width), (top, left) = crop, corner
    got = centre_crop(image, crop)
    assert torch.equal(got, image[:, top : top + height, left : left + width])
    assert np.array_equal(got.numpy(), center_crop(image.numpy(), crop))
    assert centre_crop(image, None) is image


def test_a_crop_larger_than_the_image_is_refused():
    with pytest.raises(DataError, match=r"a crop of 4 x 9 is larger than the image of \(6, 8\)"):
        centre_crop(torch.zeros(3, 6, 8), (4, 9))


def test_pixels_are_normalised_channel_by_channel():
    pixels = torch.tensor([255, 51, 0], dtype=torch.uint8).reshape(3, 1, 1).expand(3, 2, 2)
    wanted = [(1 - 0.5) / 0.5, (0.2 - 0.25) / 1.0, (0 - 0.125) / 2.0]
    got = normalise(pixels, SETTINGS)
    assert got.dtype == torch.float32
    for channel, value in zip(got, wanted, strict=True):
        torch.testing.assert_close(channel, torch.full((2, 2), value), rtol=0, atol=1e-7)  # fp32 rounding
