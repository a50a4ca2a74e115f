"""Pixels of every backend against transformers' processors, on pictures that readers disagree about."""

import io

import numpy as np
import pytest
import torch
from corpora import encode, hard_pictures, picture
from processors import PROCESSORS, build_processor, reference_pixels

from laver_mcore.data.errors import DataError
from laver_mcore.data.images import dali
from laver_mcore.data.images.backends import BACKENDS, make_backend
from laver_mcore.data.images.decode import decode_image, encoded_size
from laver_mcore.data.images.native import NativeImageProcessor
from laver_mcore.data.images.pixel_settings import smart_resize
from laver_mcore.data.images.processors import PatchImageProcessor
from laver_mcore.data.images.source import LoadedImage
from laver_mcore.data.images.wanted import GREY, WantedImage

# How far resized pixels may be from Pillow's, in 8-bit steps: mean over all pictures, and largest of any pixel.
BOUNDS = {
    "pillow": (0, 0),  # the reference itself
    # Each of the two passes rounds its weights, and then the pixel, in its own way: one pixel of a hundred, one step a
    # pass.
    "torch_uint8": (0.01, 2),
    # No rounding between the passes: it would have changed a fifth of the pixels, and noise of a thin picture more.
    "dali": (0.25, 6),
    # Rounds in between as Pillow does; what is left are weights, which are not fixed-point numbers.
    "dali_two_pass": (0.03, 4),
}


def in_steps(difference, settings):
    """Normalised pixels' difference in 8-bit steps, which are whole numbers but for fp32 rounding."""
    std = torch.tensor(settings.std).reshape(3, *[1] * (difference.ndim - 2))
    if difference.ndim == 2:  # native: every row a patch, channel by channel
        difference, std = difference.reshape(len(difference), 3, -1), std.reshape(3, 1)
    steps = difference.abs() * std / settings.scale
    assert (steps - steps.round()).abs().max() < 1e-3
    return steps.round()


def wanted(name, data):
    return WantedImage(LoadedImage(name, data), *encoded_size(data, name))


def need(backend):
    if backend.startswith("dali"):
        pytest.importorskip("nvidia.dali")


@pytest.fixture(scope="module", params=PROCESSORS)
def processor(request):
    return request.param, build_processor(request.param)


@pytest.mark.parametrize("backend", BACKENDS)
def test_pixels_agree_with_hugging_face(backend, processor):
    need(backend)
    name, ours = processor
    pictures = hard_pictures()
    images = [wanted(name, data) for name, data in pictures.items()]
    pixels, failures = make_backend(backend, ours)(images)
    assert failures == {}
    expected = torch.cat([reference_pixels(name, data) for data in pictures.values()])
    assert pixels.shape == expected.shape
    steps = in_steps(pixels - expected, ours.settings)
    mean, largest = BOUNDS[backend]
    assert steps.mean() <= mean
    assert steps.max() <= largest


@pytest.mark.parametrize("backend", BACKENDS)
def test_damaged_images_come_out_grey_and_take_no_other_along(backend):
    need(backend)
    ours = build_processor("siglip")
    good = wanted("good", encode(picture(50, 40)))
    size = (50, 40)
    bad = {
        1: (encode(picture(50, 40))[:200], "cannot be decoded"),
        2: (b"", "cannot be decoded"),
        4: (b"<html>404</html>", "cannot be decoded"),
        5: (encode(picture(40, 50)), "is 40 x 50 pixels, was 50 x 40 when it was indexed"),
    }
    images = [WantedImage(LoadedImage(f"bad{i}", bad[i][0]), *size) if i in bad else good for i in range(7)]
    maker = make_backend(backend, ours)
    pixels, failures = maker(images)
    assert failures.keys() == bad.keys()
    assert all(bad[i][1] in why and why.startswith(f"bad{i}") for i, why in failures.items())
    alone, _ = maker([good])
    grey = (GREY / 255 - 0.5) / 0.5
    for number, image in enumerate(pixels):
        if number in bad:
            torch.testing.assert_close(image, torch.full_like(image, grey), atol=1e-5, rtol=0)
        else:
            assert torch.equal(image, alone[0])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["siglip", "qwen2-vl", "encoder-free"])
def test_no_image_gives_an_empty_tensor_of_the_right_shape(backend, kind):
    need(backend)
    ours = (
        PatchImageProcessor(image_size=32, patch_size=8) if kind == "encoder-free" else build_processor(kind)
    )
    maker = make_backend(backend, ours)
    pixels, failures = maker([])
    some, _ = maker([wanted("x", encode(picture()))])
    assert len(pixels) == 0
    assert pixels.shape[1:] == some.shape[1:]
    assert failures == {}


def test_encoder_free_patches_agree_over_backends():
    ours = PatchImageProcessor(image_size=32, patch_size=8)
    images = [wanted(name, data) for name, data in hard_pictures().items()]
    expected, _ = make_backend("pillow", ours)(images)
    got, _ = make_backend("torch_uint8", ours)(images)
    assert (got - expected).abs().max() <= 2 / 127.5


def jpeg_of(**settings):
    file = io.BytesIO()
    picture().convert("RGB").save(file, "JPEG", **settings)
    return file.getvalue()


def spoilt(jpeg, marker):
    """A marker in the middle of the last scan."""
    place = (jpeg.rindex(b"\xff\xda") + len(jpeg)) // 2
    return jpeg[:place] + bytes((0xFF, marker)) + jpeg[place + 2 :]


def second_scan(jpeg):
    """A sequential file whose scan stands in it twice."""
    start = jpeg.rindex(b"\xff\xda")
    return jpeg[:-2] + jpeg[start:]


# JPEG -> whether it is DALI's to decode.
WHOLE = {
    "sequential": (jpeg_of(), True),
    "progressive": (jpeg_of(progressive=True), True),
    "optimised, grey": (jpeg_of(optimize=True), True),
    "with restarts": (jpeg_of(restart_marker_blocks=2), True),
    "with a comment and a profile": (jpeg_of(comment=b"\xff\xb2", icc_profile=b"\xff\xf0" * 40), True),
    "cut off": (jpeg_of()[:-40], False),
    "without its end": (jpeg_of()[:-2], False),
    "a marker that is none": (spoilt(jpeg_of(), 0xB2), False),
    "another": (spoilt(jpeg_of(progressive=True), 0xF0), False),
    "two scans": (second_scan(jpeg_of()), False),
    "scan of some coefficients": (jpeg_of().replace(b"\x00\x3f\x00", b"\x00\x00\x00", 1), False),
}


@pytest.mark.parametrize(("jpeg", "wanted"), WHOLE.values(), ids=WHOLE)
def test_damaged_jpegs_go_to_the_reference(jpeg, wanted):
    assert dali.decodes(jpeg) == wanted


@pytest.mark.parametrize("name", hard_pictures())
def test_dali_decodes_what_it_claims_to_bit_for_bit(name):
    pytest.importorskip("nvidia.dali")
    data = hard_pictures()[name]
    (array,) = dali.decode([data], 2)
    assert (array is not None) == dali.decodes(data)
    reference_only = name in ("exif.jpg", "cmyk.jpg")
    opaque = name.endswith(".jpg") or name in ("rgb.png", "grey.png", "palette.png")
    assert dali.decodes(data) == (opaque and not reference_only)
    if array is not None:
        assert np.array_equal(array, np.asarray(decode_image(data, name)))


@pytest.mark.parametrize(
    ("width", "height"),
    [(1, 1), (28, 28), (200, 1), (4000, 3000), (31, 900), (57, 43), (1000, 5), (14, 2800)],
)
def test_smart_resize_is_transformers_own(width, height):
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize as reference

    for bounds in ((56 * 56, 28 * 28 * 1280), (28 * 28, 200_000)):
        assert smart_resize(width, height, 28, *bounds) == reference(height, width, 28, *bounds)


def test_native_grids_are_the_pixels_own():
    ours = build_processor("qwen2-vl")
    assert isinstance(ours, NativeImageProcessor)
    for width, height in ((640, 480), (61, 45), (24, 400)):
        rows, columns = ours.grid(width, height)
        pixels = ours([picture(width, height)])
        assert pixels.shape == (rows * columns * ours.merge_size**2, ours.patch_dim)
    with pytest.raises(DataError, match="longer than 200:1"):
        ours.grid(1000, 4)


@pytest.mark.parametrize(
    ("backend", "missing", "message"),
    [
        ("opencv", False, "image_backend='opencv'; use one of pillow, torch_uint8, dali"),
        ("dali", True, "needs NVIDIA DALI, which is not installed"),
    ],
)
def test_unusable_backends(backend, missing, message, monkeypatch):
    if missing:
        monkeypatch.setattr(dali, "installed", lambda: False)
    with pytest.raises(DataError, match=message):
        make_backend(backend, build_processor("siglip"))


def test_without_dali_pillow_decodes_for_torch(monkeypatch):
    images = [wanted(name, data) for name, data in hard_pictures().items()]
    ours = build_processor("siglip")
    with_dali, _ = make_backend("torch_uint8", ours)(images)
    monkeypatch.setattr(dali, "installed", lambda: False)
    without, _ = make_backend("torch_uint8", ours)(images)
    assert torch.equal(with_dali, without)
