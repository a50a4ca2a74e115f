"""Image files -> what the vision tower reads, with pixels equal to the Hugging Face processor's.

EXIF orientation is left alone, as the processors do. Shapes: I = images, C = channels, H, W = pixels,
h, w = tokens, p = patch size.
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

# What Pillow raises on damaged files, depending on the format and on where the damage is.
_DECODE_ERRORS = (OSError, ValueError, SyntaxError, EOFError, IndexError, Image.DecompressionBombError)

# Names in published preprocessor_config.json files -> the class that implements them on Pillow.
_PROCESSORS = {
    "SiglipImageProcessor": "SiglipImageProcessor",  # SigLIP 2's fixed-resolution checkpoints too
    "CLIPImageProcessor": "CLIPImageProcessor",
    "CLIPFeatureExtractor": "CLIPImageProcessor",
    "BitImageProcessor": "BitImageProcessor",  # DINOv2
}


class ImageProcessor(Protocol):
    """From decoded images to the tower's input."""

    @property
    def num_tokens(self) -> int:
        """Visual tokens of one image."""

    def grid(self, width: int, height: int) -> tuple[int, int]:
        """(rows, columns) of tokens for an image of `width` x `height` pixels."""

    def __call__(self, images: Sequence[Image.Image]) -> Tensor:
        """The tower's float32 input; with no image, a tensor of the right shape and length 0."""

    def fingerprint(self) -> str:
        """Text naming everything that changes the pixels."""


def open_image(path: Path) -> Image.Image:
    """Decode an image file to RGB, EXIF orientation untouched, transparency on white.

    Raises DataError naming the file if it is damaged.
    """
    try:
        with Image.open(path) as image:
            return _to_rgb(image)
    except _DECODE_ERRORS as error:
        raise DataError(
            f"{path}: cannot be decoded ({_reason(error)}); replace the file or drop its record"
        ) from None


def _to_rgb(image: Image.Image) -> Image.Image:
    # On white, as transformers' processors do since 5.2x; before, they dropped the alpha channel, which shows
    # whatever colour an editor left behind it (black lines on black, in many published diagrams).
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def image_size(path: Path) -> tuple[int, int]:
    """(width, height) in pixels from the header alone; DataError naming the file if it is no image."""
    try:
        with Image.open(path) as image:
            return image.size
    except _DECODE_ERRORS as error:
        raise DataError(
            f"{path}: not an image ({_reason(error)}); replace the file or drop its record"
        ) from None


def _reason(error: Exception) -> str:
    return (str(error) or type(error).__name__).split("\n")[0]


class FixedImageProcessor:
    """Fixed resolution for SigLIP, SigLIP 2, CLIP and DINOv2: [I, 3, H, W] by transformers' own processor.

    `source` is a Hugging Face directory, its `preprocessor_config.json`, or that file's content as a dict;
    `patch_size` is the tower's, in pixels. CLS and register tokens are the tower's to drop: they are no
    visual tokens, so the grid does not count them.
    """

    def __init__(self, source: str | Path | dict[str, Any], *, patch_size: int) -> None:
        config, where = _preprocessor_config(source)
        name = config.get("image_processor_type", config.get("feature_extractor_type", ""))
        known = _PROCESSORS.get(str(name).removesuffix("Fast").removesuffix("Pil"))
        if known is None:
            raise DataError(
                f"{where}: image processor {name!r} is not supported; use one of {', '.join(_PROCESSORS)}"
            )
        # do_convert_rgb is null in some published files; images arrive here in RGB anyway.
        self._processor = _pillow_class(known).from_dict({**config, "do_convert_rgb": True})
        self._config = json.dumps({**config, "patch_size": patch_size}, sort_keys=True, default=str)
        size = self._processor.crop_size if self._processor.do_center_crop else self._processor.size
        if "height" not in size or "width" not in size:
            raise DataError(
                f"{where}: images of size {dict(size)} have no fixed shape; give height and width"
            )
        self.height, self.width = int(size["height"]), int(size["width"])
        self.patch_size = patch_size
        if self.height < patch_size or self.width < patch_size:
            raise DataError(f"{where}: {self.height} x {self.width} pixels hold no patch of {patch_size}")

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

    def fingerprint(self) -> str:
        return f"FixedImageProcessor({self._config})"


def _preprocessor_config(source: str | Path | dict[str, Any]) -> tuple[dict[str, Any], str]:
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
    return config, str(path)


def _pillow_class(name: str) -> Any:
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
        side, p, c = self.image_size // self.patch_size, self.patch_size, self.num_channels
        pixels_IHWC = np.empty((len(images), self.image_size, self.image_size, c), dtype=np.uint8)
        for out, image in zip(pixels_IHWC, images, strict=True):
            image = _to_rgb(image) if c == 3 else _to_rgb(image).convert("L")
            if image.size != (self.image_size, self.image_size):
                image = image.resize((self.image_size, self.image_size), Image.Resampling.BICUBIC)
            out[:] = np.asarray(image).reshape(out.shape)
        patches = pixels_IHWC.reshape(len(images), side, p, side, p, c).transpose(0, 1, 3, 5, 2, 4)
        flat = np.ascontiguousarray(patches).reshape(len(images) * side * side, self.patch_dim)
        return torch.from_numpy(flat).float().div_(127.5).sub_(1.0)

    def fingerprint(self) -> str:
        return repr(self)


class DecodedImages:
    """Opens images and keeps the first that fit into `max_bytes`: a small set is decoded once, not per epoch.

    Nothing is evicted: an epoch visits every image once, and then the least recently used is needed next.
    """

    def __init__(self, *, max_bytes: int) -> None:
        self._free_bytes = max_bytes
        self._images: dict[Path, Image.Image] = {}

    def open(self, path: Path) -> Image.Image:
        """The decoded RGB image; not to be changed in place."""
        if path in self._images:
            return self._images[path]
        image = open_image(path)
        num_bytes = 3 * image.width * image.height
        if num_bytes <= self._free_bytes:
            self._free_bytes -= num_bytes
            self._images[path] = image
        return image
