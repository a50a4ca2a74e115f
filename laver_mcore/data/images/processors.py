"""Decoded images -> what the vision tower reads, with pixels equal to the Hugging Face processor's.

Shapes: I = images, C = channels, H, W = pixels, h, w = tokens, p = patch size.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from laver_mcore.data.errors import DataError
from laver_mcore.data.images.decode import to_rgb
from laver_mcore.data.images.pixel_settings import PixelSettings, fixed_settings, read_processor

# Names in published preprocessor_config.json files -> the class that implements them on Pillow.
_PROCESSORS = {
    "SiglipImageProcessor": "SiglipImageProcessor",  # SigLIP 2's fixed-resolution checkpoints too
    "CLIPImageProcessor": "CLIPImageProcessor",
    "CLIPFeatureExtractor": "CLIPImageProcessor",
    "BitImageProcessor": "BitImageProcessor",  # DINOv2
}


class ImageProcessor(Protocol):
    """From decoded images to the tower's input."""

    def grid(self, width: int, height: int) -> tuple[int, int]:
        """(rows, columns) of tokens for an image of `width` x `height` pixels."""

    def __call__(self, images: Sequence[Image.Image]) -> Tensor:
        """The tower's float32 input; with no image, a tensor of the right shape and length 0."""

    @property
    def settings(self) -> PixelSettings:
        """What a backend needs to resize and crop by itself."""

    def finish(self, resized: Sequence[Tensor]) -> Tensor:
        """What `__call__` returns, from images that are resized and cropped already: uint8 [3, H, W] each."""

    def fingerprint(self) -> str:
        """Text naming everything that changes the pixels."""


class FixedImageProcessor:
    """Fixed resolution for SigLIP, SigLIP 2, CLIP and DINOv2: [I, 3, H, W] by transformers' own processor.

    `source` is a Hugging Face directory, its `preprocessor_config.json`, or that file's content as a dict;
    `patch_size` is the tower's, in pixels, and so is `image_size`, the one side that it takes (None: any).
    CLS and register tokens are the tower's to drop: they are no visual tokens, so the grid does not count them.
    """

    def __init__(
        self, source: str | Path | dict[str, Any], *, patch_size: int, image_size: int | None = None
    ) -> None:
        config, where = preprocessor_config(source)
        name = config.get("image_processor_type", config.get("feature_extractor_type", ""))
        known = _PROCESSORS.get(str(name).removesuffix("Fast").removesuffix("Pil"))
        if known is None:
            raise DataError(
                f"{where}: image processor {name!r} is not supported; use one of {', '.join(_PROCESSORS)}"
            )
        # do_convert_rgb is null in some published files; images arrive here in RGB anyway.
        self._processor, self.settings = read_processor(
            lambda: pillow_class(known).from_dict({**config, "do_convert_rgb": True}),
            lambda processor: fixed_settings(processor, where),
            where,
        )
        self._config = json.dumps({**config, "patch_size": patch_size}, sort_keys=True, default=str)
        self.height, self.width = self.settings.crop or (self.settings.height, self.settings.width)
        self.patch_size = patch_size
        if self.height < patch_size or self.width < patch_size:
            raise DataError(f"{where}: {self.height} x {self.width} pixels hold no patch of {patch_size}")
        if image_size is not None and (self.height, self.width) != (image_size, image_size):
            raise DataError(
                f"{where}: makes images of {self.height} x {self.width} pixels, but the tower's config.json says "
                f"image_size={image_size}; use the preprocessor_config.json that came with the tower"
            )

    @property
    def num_tokens(self) -> int:
        # A convolution of stride p drops the rest: SigLIP 384/14 gives 27 x 27.
        return (self.height // self.patch_size) * (self.width // self.patch_size)

    def grid(self, width: int, height: int) -> tuple[int, int]:
        return self.height // self.patch_size, self.width // self.patch_size

    def __call__(self, images: Sequence[Image.Image]) -> Tensor:
        if not images:
            return torch.empty(0, 3, self.height, self.width)
        return self._processor(list(images), return_tensors="pt")["pixel_values"]

    def finish(self, resized: Sequence[Tensor]) -> Tensor:
        if not resized:
            return torch.empty(0, 3, self.height, self.width)
        return normalise(torch.stack(list(resized)), self.settings)

    def fingerprint(self) -> str:
        return f"FixedImageProcessor({self._config})"


def normalise(pixels: Tensor, settings: PixelSettings) -> Tensor:
    """uint8 [..., 3, H, W] -> float32, rescaled, less the mean, over the standard deviation."""
    mean = torch.tensor(settings.mean, device=pixels.device).view(3, 1, 1)
    std = torch.tensor(settings.std, device=pixels.device).view(3, 1, 1)
    return pixels.float().mul_(settings.scale).sub_(mean).div_(std)


def preprocessor_config(source: str | Path | dict[str, Any]) -> tuple[dict[str, Any], str]:
    """The content of a preprocessor_config.json, and what to call it in an error."""
    if isinstance(source, dict):
        return source, "image processor config"
    path = Path(source)
    path = path / "preprocessor_config.json" if path.is_dir() else path
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        raise DataError(
            f"{path}: no such file; give a Hugging Face directory with a preprocessor_config.json"
        ) from None
    except ValueError as error:
        raise DataError(f"{path}: broken JSON ({error})") from None
    if not isinstance(config, dict):
        raise DataError(f"{path}: holds a {type(config).__name__}, wanted a mapping of settings")
    return config, str(path)


def pillow_class(name: str) -> Any:
    """transformers' Pillow implementation: a class of its own where torchvision's is the default one."""
    import transformers

    return getattr(transformers, f"{name}Pil", None) or getattr(transformers, name)


@dataclass(frozen=True, kw_only=True)
class PatchImageProcessor:
    """Encoder-free input: a square resize (bicubic), cut into flattened patches [I * h * w, C * p * p].

    Patches come row by row, image by image; within a patch the order is channel, row, column, that of a
    convolution's weight. Values are normalised with mean 0.5 and std 0.5, so they lie in [-1, 1].
    """

    image_size: int  # pixels
    patch_size: int  # pixels
    num_channels: int = 3  # 3: RGB, 1: greyscale

    def __post_init__(self) -> None:
        if self.num_channels not in (1, 3):
            raise DataError(f"num_channels={self.num_channels}; use 3 (RGB) or 1 (greyscale)")
        if self.patch_size < 1 or self.image_size < 1 or self.image_size % self.patch_size:
            raise DataError(
                f"image_size={self.image_size} is not divisible by patch_size={self.patch_size}; use "
                f"{max(self.patch_size, self.image_size - self.image_size % max(self.patch_size, 1))}"
            )

    @property
    def num_tokens(self) -> int:
        return (self.image_size // self.patch_size) ** 2

    @property
    def patch_dim(self) -> int:
        """Numbers in one patch: C * p * p."""
        return self.num_channels * self.patch_size**2

    def grid(self, width: int, height: int) -> tuple[int, int]:
        side = self.image_size // self.patch_size
        return side, side

    def __call__(self, images: Sequence[Image.Image]) -> Tensor:
        c = self.num_channels
        pixels_IHWC = np.empty((len(images), self.image_size, self.image_size, c), dtype=np.uint8)
        for out, image in zip(pixels_IHWC, images, strict=True):
            image = to_rgb(image) if c == 3 else to_rgb(image).convert("L")
            if image.size != (self.image_size, self.image_size):
                image = image.resize((self.image_size, self.image_size), Image.Resampling.BICUBIC)
            out[:] = np.asarray(image).reshape(out.shape)
        return self._patches(torch.from_numpy(pixels_IHWC).permute(0, 3, 1, 2))

    @property
    def settings(self) -> PixelSettings:
        if self.num_channels != 3:
            raise DataError("greyscale patches are made by image_backend='pillow' alone; set it")
        return PixelSettings(
            resize="square",
            height=self.image_size,
            width=self.image_size,
            crop=None,
            resample="bicubic",
            scale=1 / 255,
            mean=(0.5, 0.5, 0.5),
            std=(0.5, 0.5, 0.5),
        )

    def finish(self, resized: Sequence[Tensor]) -> Tensor:
        if not resized:
            return torch.empty(0, self.patch_dim)
        return self._patches(torch.stack(list(resized)))

    def _patches(self, pixels_ICHW: Tensor) -> Tensor:
        side, p, c = self.image_size // self.patch_size, self.patch_size, self.num_channels
        patches = pixels_ICHW.reshape(-1, c, side, p, side, p).permute(0, 2, 4, 1, 3, 5)
        return patches.reshape(-1, self.patch_dim).float().div_(127.5).sub_(1.0)

    def fingerprint(self) -> str:
        return repr(self)
