"""What a frozen encoder sees of an image: the part that the vision tower sees, with its own size and normalisation.

A tower that cuts the middle out of a picture (CLIP) and a frozen encoder that cuts out another middle (DINOv2) would
have features of different places at the same token; so the tower's part is stretched to the encoder's size, and each
token's features are those of its own place.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from laver_mcore.data.errors import DataError
from laver_mcore.data.images.backends import ReferencePixels
from laver_mcore.data.images.decode import DecodedImages
from laver_mcore.data.images.pixel_settings import PixelSettings, normalisation, read_processor
from laver_mcore.data.images.processors import (
    FixedImageProcessor,
    ImageProcessor,
    normalise,
    pillow_class,
    preprocessor_config,
)
from laver_mcore.data.images.wanted import PixelMaker

_PROCESSORS = {
    "SiglipImageProcessor": "SiglipImageProcessor",
    "CLIPImageProcessor": "CLIPImageProcessor",  # RADIO too
    "CLIPFeatureExtractor": "CLIPImageProcessor",
    "BitImageProcessor": "BitImageProcessor",  # DINOv2
    "SamImageProcessor": "SamImageProcessor",
    "DPTImageProcessor": "DPTImageProcessor",  # Depth Anything
}


class TargetSource(Protocol):
    """Where the targets of an image come from."""

    def maker(self, images: DecodedImages) -> PixelMaker:
        """What makes them from images, which may have been decoded already."""

    def fingerprint(self) -> str:
        """Text naming everything that changes them."""


class TargetProcessor:
    """Images -> float32 [I, 3, S, S], S = `image_size`, for a frozen encoder with the directory `source`.

    `tower` is the processor of the tower beside it, None for one that sees whole images.
    """

    def __init__(
        self, source: str | Path | dict[str, Any], *, tower: ImageProcessor | None, image_size: int
    ) -> None:
        config, where = preprocessor_config(source)
        name = str(config.get("image_processor_type", config.get("feature_extractor_type", "")))
        known = _PROCESSORS.get(name.removesuffix("Fast").removesuffix("Pil"))
        if known is None:
            raise DataError(
                f"{where}: image processor {name!r} is not supported; use one of {', '.join(_PROCESSORS)}"
            )
        self.side, self._tower = image_size, _cropping(tower)
        _, self._settings = read_processor(
            lambda: pillow_class(known).from_dict(config),
            lambda processor: PixelSettings(
                resize="square", height=image_size, width=image_size, crop=None, **normalisation(processor)
            ),
            where,
        )

    def view(self, width: int, height: int) -> tuple[float, float, float, float]:
        """(left, top, right, bottom) in pixels of what the tower sees of an image."""
        if self._tower is None:
            return 0.0, 0.0, float(width), float(height)
        crop = self._tower.crop
        assert crop is not None
        rows, columns = self._tower.target(width, height)
        tall, wide = min(1.0, crop[0] / rows) * height, min(1.0, crop[1] / columns) * width
        left, top = (width - wide) / 2, (height - tall) / 2
        return left, top, left + wide, top + tall

    def __call__(self, images: Sequence[Image.Image]) -> Tensor:
        settings, resample = self._settings, getattr(Image.Resampling, self._settings.resample.upper())
        pixels_I3HW = torch.empty(len(images), 3, self.side, self.side)
        for out_3HW, image in zip(pixels_I3HW, images, strict=True):
            resized = image.resize((self.side, self.side), resample, box=self.view(*image.size))
            out_3HW.copy_(normalise(torch.from_numpy(np.array(resized)).permute(2, 0, 1), settings))
        return pixels_I3HW

    def maker(self, images: DecodedImages) -> PixelMaker:
        return ReferencePixels(self, images)

    def fingerprint(self) -> str:
        return f"TargetProcessor({self._settings}, {_describe(self._tower)})"


def view_of(tower: ImageProcessor | None) -> str:
    """What part of an image a tower sees."""
    return _describe(_cropping(tower))


def _cropping(tower: ImageProcessor | None) -> PixelSettings | None:
    """Settings of a tower that sees a part of an image; None for the others."""
    return tower.settings if isinstance(tower, FixedImageProcessor) and tower.settings.crop else None


def _describe(settings: PixelSettings | None) -> str:
    if settings is None or settings.crop is None:
        return "whole"
    return f"the middle {settings.crop[0]} x {settings.crop[1]} of an image whose shorter side is {settings.height}"
