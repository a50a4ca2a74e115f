"""An image that is wanted, and what every backend does to one: read it, check its size, cut its middle out."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from torch import Tensor

from laver_mcore.data.errors import DataError
from laver_mcore.data.images.decode import decode_image
from laver_mcore.data.images.source import ImageSource, read_image_bytes

GREY = 128


@dataclass(frozen=True)
class WantedImage:
    """An image to be read, with the size in pixels that its grid was computed from."""

    source: ImageSource
    width: int
    height: int


class PixelMaker(Protocol):
    """Reads, decodes and processes images."""

    def __call__(self, images: Sequence[WantedImage]) -> tuple[Tensor, dict[int, str]]:
        """The tower's input for all of `images`, and why some of them are grey: {position: reason}."""


def check_size(image: WantedImage, width: int, height: int) -> None:
    if (width, height) != (image.width, image.height):
        raise DataError(
            f"{image.source}: is {width} x {height} pixels, was {image.width} x {image.height} when it was "
            "indexed; delete the index"
        )


def read_all(images: Sequence[WantedImage]) -> tuple[list[bytes], dict[int, str]]:
    """Encoded bytes of each image, empty where they cannot be read, and why."""
    failures: dict[int, str] = {}
    encoded: list[bytes] = []
    for position, image in enumerate(images):
        try:
            encoded.append(read_image_bytes(image.source))
        except DataError as error:
            failures[position] = str(error)
            encoded.append(b"")
    return encoded, failures


def fits(image: WantedImage, shape: Sequence[int]) -> bool:
    """Whether decoded pixels [H, W, 3] have the size that was indexed."""
    return (shape[1], shape[0]) == (image.width, image.height)


def by_pillow(image: WantedImage, encoded: bytes, position: int, failures: dict[int, str]) -> np.ndarray:
    """uint8 [H, W, 3] of an image that DALI has not decoded; grey, and named in `failures`, if Pillow cannot."""
    try:
        if position in failures:
            raise DataError(failures[position])
        array = np.array(decode_image(encoded, str(image.source)))
        check_size(image, array.shape[1], array.shape[0])
    except DataError as error:
        failures[position] = str(error)
        array = np.full((image.height, image.width, 3), GREY, dtype=np.uint8)
    return array


def centre_crop(image_CHW: Tensor, crop: tuple[int, int] | None) -> Tensor:
    """The middle of an image; DataError for one that is smaller than the crop (height, width)."""
    if crop is None:
        return image_CHW
    height, width = crop
    top, left = (image_CHW.shape[1] - height) // 2, (image_CHW.shape[2] - width) // 2
    if top < 0 or left < 0:
        raise DataError(
            f"a crop of {height} x {width} is larger than the image of {tuple(image_CHW.shape[1:])}; "
            "use image_backend='pillow'"
        )
    return image_CHW[:, top : top + height, left : left + width]
