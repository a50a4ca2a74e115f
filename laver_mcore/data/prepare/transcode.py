"""An encoded image, decoded strictly, and re-encoded only where readers would disagree about it."""

import hashlib
import io
from dataclasses import dataclass

from PIL import Image, ImageOps

from laver_mcore.data.errors import DataError, reason
from laver_mcore.data.images.decode import DECODE_ERRORS, orientation, to_rgb

_JPEG_QUALITY = 95
_KEPT_MODES = {"JPEG": ("RGB", "L", "CMYK"), "MPO": ("RGB", "L"), "PNG": ("1", "L", "P", "RGB", "LA", "RGBA")}
_LOSSY = ("JPEG", "MPO", "AVIF", "WEBP")


@dataclass(frozen=True, kw_only=True)
class ImageLimits:
    """What an image may be: larger ones are scaled down, more extreme shapes refused."""

    max_pixels: int = 4096 * 4096
    max_aspect: float = 200.0


@dataclass(frozen=True, kw_only=True)
class PreparedImage:
    """One image as it goes into a shard."""

    extension: str  # jpg or png
    data: bytes
    width: int
    height: int
    blake2b: str


def prepare_image(encoded: bytes, limits: ImageLimits, where: str) -> PreparedImage:
    """Decode every pixel of an image and give back bytes to keep: the original ones where possible.

    EXIF rotation is applied, 16 bits become 8, animations give their first frame; whatever is no plain JPEG
    or PNG becomes one. Raises DataError for an image that cannot be decoded whole or is too extreme in shape.
    """
    try:
        with Image.open(io.BytesIO(encoded)) as image:
            turned = orientation(image) != 1
            image.load()  # Pillow raises on a truncated file; it does not check a JPEG's entropy-coded bits
            kind, mode = str(image.format), image.mode
            frames = getattr(image, "n_frames", 1) if kind == "PNG" else 1
            width, height = image.size
            _check_shape(width, height, limits, where)
            large = width * height > limits.max_pixels
            if mode in _KEPT_MODES.get(kind, ()) and not turned and not large and frames == 1:
                return _prepared("png" if kind == "PNG" else "jpg", encoded, image.size)
            image.seek(0)
            picture = ImageOps.exif_transpose(image) if turned else image
            picture = to_rgb(picture)
    except DataError:
        raise
    except DECODE_ERRORS as error:
        raise DataError(f"{where}: cannot be decoded ({reason(error)})", kind="image") from None
    if large:
        scale = (limits.max_pixels / (width * height)) ** 0.5
        size = (max(1, int(picture.width * scale)), max(1, int(picture.height * scale)))
        picture = picture.resize(size, Image.Resampling.LANCZOS)
    lossy = kind in _LOSSY and "A" not in mode
    file = io.BytesIO()
    if lossy:
        picture.save(file, "JPEG", quality=_JPEG_QUALITY, subsampling=0)
    else:
        picture.save(file, "PNG")
    return _prepared("jpg" if lossy else "png", file.getvalue(), picture.size)


def _check_shape(width: int, height: int, limits: ImageLimits, where: str) -> None:
    if max(width, height) > limits.max_aspect * min(width, height):
        raise DataError(
            f"{where}: {width} x {height} pixels is beyond an aspect ratio of {limits.max_aspect:g}",
            kind="image",
        )


def _prepared(extension: str, data: bytes, size: tuple[int, int]) -> PreparedImage:
    digest = hashlib.blake2b(data, digest_size=16).hexdigest()
    return PreparedImage(extension=extension, data=data, width=size[0], height=size[1], blake2b=digest)
