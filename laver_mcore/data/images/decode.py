"""Encoded images -> RGB on Pillow, the reference that every other backend is measured against.

EXIF orientation is left alone, as the Hugging Face processors do. Transparency goes on white, 16 bits become
8.
"""

import io
from pathlib import Path

import numpy as np
from PIL import Image

from laver_mcore.data.errors import DataError, reason
from laver_mcore.data.images.source import ImageSource, read_image_bytes

# What Pillow and its plugins raise on damaged files depends on the format and on where the damage is:
# whatever it is, it is about this one file.
DECODE_ERRORS = Exception


def open_image(source: ImageSource) -> Image.Image:
    """Decode an image to RGB, EXIF orientation untouched, transparency on white.

    Raises DataError naming the image if it is damaged.
    """
    if isinstance(source, Path):
        return _decode(source, str(source))
    return decode_image(read_image_bytes(source), str(source))


def decode_image(encoded: bytes, where: str) -> Image.Image:
    """`open_image` for bytes; `where` starts the error."""
    return _decode(io.BytesIO(encoded), where)


def _decode(file: Path | io.BytesIO, where: str) -> Image.Image:
    try:
        with Image.open(file) as image:
            return to_rgb(image)
    except DECODE_ERRORS as error:
        raise DataError(
            f"{where}: cannot be decoded ({reason(error)}); replace the file or drop its record",
            kind="image",
        ) from None


def to_rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB, transparency on white."""
    # On white, as transformers' processors do since 5.2x; before, they dropped the alpha channel, which shows
    # whatever colour an editor left behind it (black lines on black, in many published diagrams).
    if image.mode.startswith(("I", "F")):
        image = _from_sixteen_bits(image)
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _from_sixteen_bits(image: Image.Image) -> Image.Image:
    """Grey of 16 bits to 8; Pillow's own conversion clips at 255, which leaves a white page."""
    values = np.asarray(image)
    if values.dtype != np.uint16 and values.size and values.max() <= 255:
        return Image.fromarray(values.clip(0).astype(np.uint8))
    return Image.fromarray((values.astype(np.int64).clip(0, 65535) >> 8).astype(np.uint8))


def image_size(path: Path) -> tuple[int, int]:
    """(width, height) in pixels from the header alone; DataError naming the file if it is no image."""
    return _size(path, str(path))


def encoded_size(encoded: bytes, where: str) -> tuple[int, int]:
    """`image_size` for bytes; `where` starts the error."""
    return _size(io.BytesIO(encoded), where)


def _size(file: Path | io.BytesIO, where: str) -> tuple[int, int]:
    try:
        with Image.open(file) as image:
            return image.size
    except DECODE_ERRORS as error:
        raise DataError(
            f"{where}: not an image ({reason(error)}); replace the file or drop its record",
            kind="image",
        ) from None


class DecodedImages:
    """Opens images and keeps the first that fit into `max_bytes`: a small set is decoded once, not per epoch.

    Nothing is evicted: an epoch visits every image once, and then the least recently used is needed next. The last
    one is kept as well: a tower and a frozen encoder look at it one after the other.
    """

    def __init__(self, *, max_bytes: int) -> None:
        self._free_bytes = max_bytes
        self._images: dict[ImageSource, Image.Image] = {}
        self._last: tuple[ImageSource, Image.Image] | None = None

    def open(self, source: ImageSource) -> Image.Image:
        """The decoded RGB image; not to be changed in place."""
        if source in self._images:
            return self._images[source]
        if self._last is not None and self._last[0] == source:
            return self._last[1]
        image = open_image(source)
        num_bytes = 3 * image.width * image.height
        if num_bytes <= self._free_bytes:
            self._free_bytes -= num_bytes
            self._images[source] = image
        self._last = source, image
        return image
