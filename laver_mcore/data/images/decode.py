"""Encoded images -> RGB on Pillow, the reference that every other backend is measured against.

One rule for every reader: the orientation that EXIF asks for is applied, transparency goes on white, 16 bits become 8
by their upper byte whatever range they use, floating point must lie in 0..1. An image whose range the file does not
tell is refused, never guessed at.
"""

import io
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from laver_mcore.data.errors import DataError, reason
from laver_mcore.data.images.source import ImageSource, read_image_bytes

# What Pillow and its plugins raise on damaged files depends on the format and on where the damage is:
# whatever it is, it is about this one file.
DECODE_ERRORS = Exception
_EXIF_ORIENTATION = 0x0112


def open_image(source: ImageSource) -> Image.Image:
    """Decode an image to RGB, upright, transparency on white.

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
            return to_rgb(upright(image))
    except DECODE_ERRORS as error:
        raise DataError(
            f"{where}: cannot be decoded ({reason(error)}); replace the file or drop its record",
            kind="image",
        ) from None


def orientation(image: Image.Image) -> int:
    """EXIF orientation 1 to 8 of an image that was opened and not yet loaded; 1 where none is given or readable."""
    if image.format == "TIFF":
        return 1  # Pillow turns these itself, their size included
    if image.format == "PNG" and not {"exif", "Raw profile type exif"} & set(image.info):
        return 1  # asking further would decode the pixels to look behind them
    try:
        found = image.getexif().get(_EXIF_ORIENTATION, 1)
    except Exception:  # damaged metadata is no damaged picture
        return 1
    return found if found in range(1, 9) else 1


def upright(image: Image.Image) -> Image.Image:
    """An opened image as EXIF wants it shown."""
    if orientation(image) == 1:
        return image
    return ImageOps.exif_transpose(image)


def to_rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB, transparency on white."""
    # On white, as transformers' processors do since 5.2x; before, they dropped the alpha channel, which shows
    # whatever colour an editor left behind it (black lines on black, in many published diagrams).
    if image.mode == "F":
        image = _from_floats(image)
    elif image.mode.startswith("I"):
        image = _from_sixteen_bits(image)
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _from_sixteen_bits(image: Image.Image) -> Image.Image:
    """Grey of 16 bits to 8; Pillow's own conversion clips at 255, which leaves a white page."""
    values = np.asarray(image)
    if image.format == "TIFF" and values.dtype.itemsize > 2:
        raise ValueError("32-bit integers, which have no full scale; convert it to 8 or 16 bits")
    return Image.fromarray((values.astype(np.int64).clip(0, 65535) >> 8).astype(np.uint8))


def _from_floats(image: Image.Image) -> Image.Image:
    """Grey of 0..1 to 8 bits; ValueError for other values, whose full scale no file tells."""
    values = np.asarray(image)
    if not (np.isfinite(values).all() and values.min() >= 0 and values.max() <= 1):
        raise ValueError(f"floating point from {values.min():g} to {values.max():g}, wanted 0 to 1")
    return Image.fromarray(np.round(values * 255).astype(np.uint8))


def image_size(path: Path) -> tuple[int, int]:
    """(width, height) in pixels, upright, from the header alone; DataError naming the file if it is no image."""
    return _size(path, str(path))


def encoded_size(encoded: bytes, where: str) -> tuple[int, int]:
    """`image_size` for bytes; `where` starts the error."""
    return _size(io.BytesIO(encoded), where)


def _size(file: Path | io.BytesIO, where: str) -> tuple[int, int]:
    try:
        with Image.open(file) as image:
            width, height = image.size
            return (height, width) if orientation(image) >= 5 else (width, height)
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
