"""Pictures that people have, through every backend and reader: one rule, or refused with the file's name."""

import io
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from corpora import encode, picture
from PIL import Image, ImageOps

from laver_mcore.data.errors import DataError
from laver_mcore.data.images import dali
from laver_mcore.data.images.backends import BACKENDS, make_backend
from laver_mcore.data.images.decode import decode_image, encoded_size
from laver_mcore.data.images.processors import PatchImageProcessor
from laver_mcore.data.images.source import LoadedImage
from laver_mcore.data.images.wanted import WantedImage
from laver_mcore.data.prepare.transcode import ImageLimits, prepare_image

RAMP = np.linspace(0, 1, 40 * 30, dtype=np.float32).reshape(30, 40)


def array(values, kind="TIFF"):
    return encode(Image.fromarray(values), kind)


def exif(orientation, kind="JPEG", mode="RGB", **options):
    tags = Image.Exif()
    tags[0x0112] = orientation
    return encode(picture(mode=mode), kind, exif=tags, **options)


def without_adobe_marker(jpeg):
    """The same JPEG less its APP14 segment, as several scanners write CMYK."""
    position = 2
    while jpeg[position + 1] != 0xEE:
        position += 2 + struct.unpack(">H", jpeg[position + 2 : position + 4])[0]
    length = 2 + struct.unpack(">H", jpeg[position + 2 : position + 4])[0]
    return jpeg[:position] + jpeg[position + length :]


def upright(data):
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))


def grey(values):
    return np.repeat(np.asarray(values).astype(np.uint8)[..., None], 3, axis=-1)


SIXTEEN = (RAMP * 65535).astype(np.uint16)
TWELVE = (RAMP * 4095).astype(np.uint16)
# Bytes of a file, and what it shows (uint8 [H, W, 3]), or the reason why it is refused.
PICTURES = {
    "floats of 0 to 1": (array(RAMP), grey(np.round(RAMP * 255))),
    "floats of 0 to 255": (array(RAMP * 255), "floating point from 0 to 255, wanted 0 to 1"),
    "floats below 0": (array(RAMP - 0.5), "floating point from -0.5 to 0.5, wanted 0 to 1"),
    "floats with NaN": (array(np.where(RAMP > 0.5, np.nan, RAMP).astype(np.float32)), "floating point"),
    "16 bits, PNG": (array(SIXTEEN, "PNG"), grey(SIXTEEN >> 8)),
    "16 bits, TIFF": (array(SIXTEEN), grey(SIXTEEN >> 8)),
    "12 bits in 16, PNG": (array(TWELVE, "PNG"), grey(TWELVE >> 8)),
    "12 bits in 16, TIFF": (array(TWELVE), grey(TWELVE >> 8)),
    "8 bits in 16": (array((RAMP * 255).astype(np.uint16), "PNG"), grey(np.zeros_like(RAMP))),
    "32-bit integers": (array((RAMP * 255).astype(np.int32)), "32-bit integers, which have no full scale"),
    "cut AVIF": ((Path(__file__).parent / "cases" / "broken.avif").read_bytes(), "cannot be decoded"),
    "a web page": (b"<html>404</html>", "cannot be decoded"),
    "nothing": (b"", "cannot be decoded"),
}
PICTURES |= {f"exif {n}, {kind}": (exif(n, kind), None) for n in range(1, 9) for kind in ("JPEG", "PNG")}
PICTURES |= {f"exif {n}, {kind}": (exif(n, kind), None) for n in (1, 6) for kind in ("WEBP", "TIFF", "AVIF")}
PICTURES |= {"exif 9, which is none": (exif(9), None), "exif 6, grey": (exif(6, mode="L"), None)}
CMYK = encode(picture(mode="CMYK"))
PICTURES |= {"cmyk": (CMYK, None), "cmyk without Adobe marker": (without_adobe_marker(CMYK), None)}
PROCESSOR = PatchImageProcessor(image_size=16, patch_size=8)


@pytest.mark.parametrize(("data", "shown"), PICTURES.values(), ids=PICTURES)
def test_decoded_and_prepared(data, shown):
    if isinstance(shown, str):
        for read in (
            lambda: decode_image(data, "x.bin"),
            lambda: prepare_image(data, ImageLimits(), "x.bin"),
        ):
            with pytest.raises(DataError, match=shown) as caught:
                read()
            assert str(caught.value).startswith("x.bin: ")
            assert caught.value.kind == "image"
            assert "0x" not in str(caught.value)
        return
    shown = upright(data) if shown is None else shown
    decoded = decode_image(data, "x.bin")
    assert np.array_equal(np.asarray(decoded), shown)
    assert encoded_size(data, "x.bin") == decoded.size
    prepared = prepare_image(data, ImageLimits(), "x.bin")
    assert (prepared.width, prepared.height) == decoded.size
    error = np.abs(np.asarray(decode_image(prepared.data, "x.bin")).astype(int) - shown)
    assert error.mean() < 4  # JPEG once more


@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_every_backend_sees_what_pillow_sees(backend):
    if backend.startswith("dali") and not dali.installed():
        pytest.skip("NVIDIA DALI is not installed")
    wanted = []
    for name, (data, shown) in PICTURES.items():
        size = (40, 30) if isinstance(shown, str) else encoded_size(data, name)
        wanted.append(WantedImage(LoadedImage(name, data), *size))
    expected, failures = make_backend("pillow", PROCESSOR)(wanted)
    pixels, failed = make_backend(backend, PROCESSOR)(wanted)
    assert failed == failures
    assert len(failures) == sum(isinstance(shown, str) for _, shown in PICTURES.values())
    # Resizing rounds otherwise; another decoding is far off.
    assert torch.stack([(a - b).abs().mean() for a, b in zip(pixels, expected, strict=True)]).max() < 0.03


def test_a_fuzzed_file_is_read_alike_or_refused():
    """1,500 JPEGs and PNGs with changed bytes: DALI's decision and Pillow's never differ in silence."""
    if not dali.installed():
        pytest.skip("NVIDIA DALI is not installed")
    draw = np.random.default_rng(0)
    seeds = [encode(picture()), encode(picture(mode="CMYK")), encode(picture(), "PNG"), exif(6)]
    files = []
    for number in range(1500):
        data = bytearray(seeds[number % len(seeds)])
        for position in draw.integers(2, min(len(data), 700), 3):
            data[position] = draw.integers(0, 256)
        files.append(bytes(data))
    # In small batches: DALI 2.4.0 dies of a batch of 128 with dozens of damaged files among them.
    decoded = [
        image for start in range(0, len(files), 8) for image in dali.decode(files[start : start + 8], 1)
    ]
    for data, ours in zip(files, decoded, strict=True):
        try:
            expected = np.asarray(decode_image(data, "x"))
        except DataError:
            continue
        if ours is not None and ours.shape == expected.shape:
            assert np.abs(ours.astype(int) - expected).mean() < 1
