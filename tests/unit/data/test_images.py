"""Pixels equal to the Hugging Face processors', for every kind of file they meet; and the patch order."""

import json

import numpy as np
import pytest
import torch
import transformers
from PIL import Image, ImageOps
from transformers.image_utils import load_image

from laver_mcore.data.errors import DataError
from laver_mcore.data.images.decode import DecodedImages, image_size, open_image
from laver_mcore.data.images.processors import (
    FixedImageProcessor,
    PatchImageProcessor,
)


def hugging_face_class(name):
    return getattr(transformers, f"{name}Pil", None) or getattr(transformers, name)


CONFIGS = {
    "siglip": {
        "image_processor_type": "SiglipImageProcessor",
        "size": {"height": 28, "width": 28},
        "resample": 3,
    },
    "siglip2": {
        "image_processor_type": "SiglipImageProcessor",
        "do_convert_rgb": None,
        "size": {"height": 28, "width": 42},
        "resample": 2,
    },
    "clip": {
        "image_processor_type": "CLIPImageProcessorFast",
        "size": {"shortest_edge": 28},
        "crop_size": {"height": 28, "width": 28},
    },
    "clip, as published for L/14-336": {
        "feature_extractor_type": "CLIPFeatureExtractor",
        "size": 28,
        "crop_size": 28,
        "do_center_crop": True,
        "do_normalize": True,
        "do_resize": True,
        "resample": 3,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
    },
    "dinov2": {
        "image_processor_type": "BitImageProcessor",
        "size": {"shortest_edge": 32},
        "crop_size": {"height": 28, "width": 28},
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
    },
}
CLASSES = {"siglip": "SiglipImageProcessor", "clip": "CLIPImageProcessor", "dinov2": "BitImageProcessor"}


def write_images(folder):
    """One file of every kind, none square."""
    draw = np.random.default_rng(0)
    rgb = Image.fromarray(draw.integers(0, 256, (45, 61, 3), dtype=np.uint8))
    alpha = Image.fromarray(draw.integers(0, 256, (61, 45, 4), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: rotate by 90 degrees
    rgb.save(folder / "rgb.jpg")
    rgb.save(folder / "exif.jpg", exif=exif)
    rgb.save(folder / "progressive.jpg", progressive=True)
    rgb.convert("L").save(folder / "grey.png")
    rgb.convert("1").save(folder / "bilevel.png")
    rgb.convert("P").save(folder / "palette.png")
    rgb.convert("P").save(folder / "palette_alpha.png", transparency=3)
    rgb.convert("CMYK").save(folder / "cmyk.jpg")
    alpha.save(folder / "alpha.png")
    alpha.convert("LA").save(folder / "grey_alpha.png")
    rgb.save(folder / "lossless.webp", lossless=True)
    rgb.save(folder / "animated.gif", save_all=True, append_images=[rgb.rotate(90)])
    rgb.crop((0, 0, 1, 1)).save(folder / "one_pixel.png")
    return sorted(folder.iterdir())


@pytest.fixture(scope="module")
def image_paths(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images"))


@pytest.mark.parametrize("name", CONFIGS)
def test_pixels_equal_hugging_face(name, image_paths):
    config = CONFIGS[name]
    family = next(family for family in CLASSES if name.startswith(family))
    reference = hugging_face_class(CLASSES[family]).from_dict(
        {key: value for key, value in config.items() if key != "do_convert_rgb"}
    )
    ours = FixedImageProcessor(config, patch_size=14)
    pixels = ours([open_image(path) for path in image_paths])
    assert pixels.dtype == torch.float32
    for path, got in zip(image_paths, pixels, strict=True):
        # The processors leave EXIF alone; transformers' own `load_image`, which reads for them, does not.
        picture = ImageOps.exif_transpose(Image.open(path))
        expected = reference(picture, return_tensors="pt", do_convert_rgb=True)["pixel_values"][0]
        assert torch.equal(got, expected), path.name
    assert ours.num_tokens * 14 * 14 == pixels[0, 0].numel()
    assert ours([]).shape == (0, *pixels.shape[1:])


def test_exif_orientation_is_applied(image_paths):
    by_name = {path.name: path for path in image_paths}
    assert image_size(by_name["exif.jpg"]) == (45, 61)
    turned = open_image(by_name["rgb.jpg"]).transpose(Image.Transpose.ROTATE_270)
    assert open_image(by_name["exif.jpg"]).tobytes() == turned.tobytes()
    assert open_image(by_name["exif.jpg"]).tobytes() == load_image(str(by_name["exif.jpg"])).tobytes()


@pytest.mark.parametrize(
    ("size", "patch_size", "grid"),
    [(384, 14, (27, 27)), (336, 14, (24, 24)), (384, 16, (24, 24)), (224, 14, (16, 16))],
)
def test_published_grids(size, patch_size, grid):
    config = {"image_processor_type": "SiglipImageProcessor", "size": {"height": size, "width": size}}
    processor = FixedImageProcessor(config, patch_size=patch_size)
    assert processor.grid(640, 480) == grid
    assert processor.num_tokens == grid[0] * grid[1]


def test_reads_a_hugging_face_directory(tmp_path):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(CONFIGS["siglip"]))
    processor = FixedImageProcessor(tmp_path, patch_size=7)
    assert processor.grid(10, 10) == (4, 4)
    assert processor.fingerprint() == FixedImageProcessor(CONFIGS["siglip"], patch_size=7).fingerprint()
    assert processor.fingerprint() != FixedImageProcessor(CONFIGS["siglip2"], patch_size=7).fingerprint()


@pytest.mark.parametrize("num_channels", [1, 3])
def test_patches_are_row_major_and_channel_first(num_channels):
    draw = np.random.default_rng(1)
    arrays = [draw.integers(0, 256, (12, 12, 3), dtype=np.uint8) for _ in range(2)]
    processor = PatchImageProcessor(image_size=12, patch_size=4, num_channels=num_channels)
    patches = processor([Image.fromarray(array) for array in arrays])
    assert patches.shape == (2 * 9, processor.patch_dim)
    assert patches.shape[1] == num_channels * 16
    mode = "RGB" if num_channels == 3 else "L"
    row = 0
    for array in arrays:
        pixels = np.asarray(Image.fromarray(array).convert(mode)).reshape(12, 12, num_channels)
        pixels = (pixels.astype(np.float32) / 255 - 0.5) / 0.5
        for r in range(3):
            for c in range(3):
                patch = pixels[4 * r : 4 * r + 4, 4 * c : 4 * c + 4].transpose(2, 0, 1)
                np.testing.assert_allclose(patches[row].numpy(), patch.reshape(-1), atol=1e-6)
                row += 1


def test_patches_are_resized_bicubically_to_a_square(image_paths):
    processor = PatchImageProcessor(image_size=8, patch_size=8)
    image = open_image(image_paths[0])
    expected = np.asarray(image.resize((8, 8), Image.Resampling.BICUBIC)).transpose(2, 0, 1).reshape(-1)
    np.testing.assert_allclose(processor([image])[0].numpy(), expected / 127.5 - 1, atol=1e-6)
    assert processor.grid(61, 45) == (1, 1)
    assert processor.num_tokens == 1
    assert processor([]).shape == (0, 192)


def test_patches_of_a_convolution(image_paths):
    """A Linear on a patch is the convolution with the same weight."""
    processor = PatchImageProcessor(image_size=16, patch_size=4)
    patches = processor([open_image(image_paths[0])])
    weight = torch.randn(5, 3, 4, 4)
    pixels = torch.nn.functional.fold(patches.T[None], (16, 16), kernel_size=4, stride=4)
    convolved = torch.nn.functional.conv2d(pixels, weight, stride=4)[0].flatten(1).T
    assert torch.allclose(patches @ weight.flatten(1).T, convolved, atol=1e-5)


@pytest.mark.parametrize(
    ("content", "opener"),
    [(b"", open_image), (b"<html>404</html>", open_image), (b"", image_size), (None, open_image)],
    ids=["empty", "web page", "empty, header only", "truncated"],
)
def test_damaged_images_are_named(content, opener, tmp_path, image_paths):
    whole = next(path for path in image_paths if path.name == "rgb.jpg").read_bytes()
    path = tmp_path / "bad.jpg"
    path.write_bytes(whole[: len(whole) // 2] if content is None else content)
    with pytest.raises(DataError, match=r"bad\.jpg: .*replace the file") as caught:
        opener(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"image_processor_type": "VideoMAEImageProcessor"},
            "'VideoMAEImageProcessor' is not supported; use one of",
        ),
        ({}, "'' is not supported"),
        (CONFIGS["clip"] | {"do_center_crop": False}, "no fixed shape"),
        (CONFIGS["siglip"] | {"size": {"height": 4, "width": 4}}, "hold no patch of 14"),
        ("nowhere", "nowhere: no such file"),
    ],
    ids=["unknown", "none", "no crop", "small", "missing"],
)
def test_unusable_processors(config, message):
    with pytest.raises(DataError, match=message):
        FixedImageProcessor(config, patch_size=14)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"image_size": 50, "patch_size": 16}, "image_size=50 is not divisible by patch_size=16; use 48"),
        ({"image_size": 48, "patch_size": 16, "num_channels": 4}, "num_channels=4; use 3"),
    ],
)
def test_unusable_patches(arguments, message):
    with pytest.raises(DataError, match=message):
        PatchImageProcessor(**arguments)


def test_decoded_images_are_kept_within_their_budget(image_paths, monkeypatch):
    opened = []
    monkeypatch.setattr(
        "laver_mcore.data.images.decode.open_image", lambda path: opened.append(path) or open_image(path)
    )
    pictures = DecodedImages(max_bytes=2 * 3 * 61 * 45)
    by_name = {path.name: path for path in image_paths}
    for _ in range(2):
        for name in ("rgb.jpg", "exif.jpg", "cmyk.jpg", "progressive.jpg", "progressive.jpg"):
            assert sorted(pictures.open(by_name[name]).size) == [45, 61]
    # Two fit; of the others the last one is there, for whoever looks at it next.
    late = ["cmyk.jpg", "progressive.jpg"]
    assert [path.name for path in opened] == ["rgb.jpg", "exif.jpg", *late, *late]
