"""Encoded images -> the tower's input, on one of four backends; one damaged image never takes others with it.

    pillow         Pillow and transformers' own processor: the reference
    torch_uint8    DALI decodes (Pillow where DALI is not installed), torch resizes 8-bit pixels: fast on CPU
    dali           DALI decodes and resizes in one pass
    dali_two_pass  the same in two passes, rounding in between as Pillow does: closest to the reference

Where the run's device is a GPU, the last two work there (`gpu_backend.py`). Every backend works in the process that
calls it, never in a forked one. An image that cannot be decoded comes out grey and is named in the answer.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from laver_mcore.data.errors import DataError
from laver_mcore.data.images import dali
from laver_mcore.data.images.decode import DecodedImages
from laver_mcore.data.images.processors import ImageProcessor
from laver_mcore.data.images.wanted import (
    GREY,
    PixelMaker,
    WantedImage,
    by_pillow,
    centre_crop,
    check_size,
    fits,
    read_all,
)

ImageBackend = Literal["pillow", "torch_uint8", "dali", "dali_two_pass"]
BACKENDS = ("pillow", "torch_uint8", "dali", "dali_two_pass")


def make_backend(
    name: str,
    processor: ImageProcessor,
    *,
    num_threads: int = 2,
    decoded: DecodedImages | None = None,
    device: torch.device | None = None,
) -> PixelMaker:
    """The backend called `name`; DataError for an unknown one, or for DALI where it is not installed.

    `decoded` keeps images for the reference. On a CUDA `device` the DALI backends decode and resize there and return
    pixels there; the others ignore it.
    """
    if name not in BACKENDS:
        raise DataError(f"image_backend={name!r}; use one of {', '.join(BACKENDS)}")
    if name == "pillow":
        return ReferencePixels(processor, decoded or DecodedImages(max_bytes=0))
    if name.startswith("dali") and not dali.installed():
        raise DataError(
            f"image_backend={name!r} needs NVIDIA DALI, which is not installed; use 'pillow' or "
            "install the extra: laver-mcore[data]"
        )
    settings = processor.settings
    if settings.resample not in ("bilinear", "bicubic"):
        raise DataError(f"image_backend={name!r} has no {settings.resample} filter; use 'pillow'")
    if name.startswith("dali") and device is not None and device.type == "cuda":
        from laver_mcore.data.images.gpu_backend import GpuPixels

        return GpuPixels(processor, device, two_pass=name == "dali_two_pass", num_threads=num_threads)
    return _Fast(name, processor, num_threads)


class ReferencePixels:
    """Pillow and transformers."""

    def __init__(self, processor: Callable[[Sequence[Image.Image]], Tensor], decoded: DecodedImages) -> None:
        self._processor, self._decoded = processor, decoded

    def __call__(self, images: Sequence[WantedImage]) -> tuple[Tensor, dict[int, str]]:
        decoded, failures = [], {}
        for position, image in enumerate(images):
            try:
                picture = self._decoded.open(image.source)
                check_size(image, *picture.size)
            except DataError as error:
                failures[position] = str(error)
                picture = Image.new("RGB", (image.width, image.height), (GREY, GREY, GREY))
            decoded.append(picture)
        return self._processor(decoded), failures


class _Fast:
    """DALI's decoder, where installed, and DALI or torch to resize."""

    def __init__(self, name: str, processor: ImageProcessor, num_threads: int) -> None:
        self._name, self._processor, self._settings = name, processor, processor.settings
        self._threads = ThreadPoolExecutor(num_threads, thread_name_prefix="laver-resize")
        self._num_threads = num_threads

    def __call__(self, images: Sequence[WantedImage]) -> tuple[Tensor, dict[int, str]]:
        decoded, failures = self._decode(images)
        targets = [self._settings.target(image.width, image.height) for image in images]
        if self._name == "torch_uint8":
            resized = list(self._threads.map(self._torch_resize, decoded, targets))
        else:
            two_pass = self._name == "dali_two_pass"
            arrays = dali.resize(decoded, targets, self._settings.resample, two_pass, self._num_threads)
            resized = [torch.from_numpy(array).permute(2, 0, 1) for array in arrays]
        return self._processor.finish(
            [centre_crop(image, self._settings.crop) for image in resized]
        ), failures

    def _decode(self, images: Sequence[WantedImage]) -> tuple[list[np.ndarray], dict[int, str]]:
        """uint8 [H, W, 3] arrays; on DALI all at once, then one by one, then on Pillow."""
        encoded, failures = read_all(images)
        decoded = dali.decode(encoded, self._num_threads)
        arrays = [
            array if array is not None and fits(image, array.shape) else None
            for image, array in zip(images, decoded, strict=True)
        ]
        return [
            array if array is not None else by_pillow(image, encoded[position], position, failures)
            for position, (image, array) in enumerate(zip(images, arrays, strict=True))
        ], failures

    def _torch_resize(self, image_HWC: np.ndarray, target: tuple[int, int]) -> Tensor:
        image_1CHW = torch.from_numpy(image_HWC).permute(2, 0, 1).unsqueeze(0)  # channels last in memory
        if image_HWC.shape[:2] == target:
            return image_1CHW[0]
        return torch.nn.functional.interpolate(
            image_1CHW, size=target, mode=self._settings.resample, antialias=True, align_corners=False
        )[0]
