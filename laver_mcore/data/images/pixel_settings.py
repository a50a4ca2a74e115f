"""The numbers of a `preprocessor_config.json` that decide an image's pixels, read once for every backend."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from laver_mcore.data.errors import DataError, reason

FILTERS = {
    0: "nearest",
    1: "lanczos",
    2: "bilinear",
    3: "bicubic",
    4: "box",
    5: "hamming",
}  # Pillow's numbers


@dataclass(frozen=True, kw_only=True)
class PixelSettings:
    """Resize, centre crop, rescale, normalise; sizes in pixels."""

    resize: Literal["square", "shortest", "native", "none"]
    height: int  # square: the target; shortest: the shortest edge, in both
    width: int
    crop: tuple[int, int] | None  # height, width
    resample: str
    scale: float
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    factor: int = 1  # native: both sides become multiples of this
    min_pixels: int = 0
    max_pixels: int = 0

    def check(self, where: str) -> None:
        """DataError for settings that give no pixels, or pixels that are no numbers."""
        wrong = {
            "size": self.resize in ("square", "shortest") and min(self.height, self.width) < 1,
            "crop_size": self.crop is not None and min(self.crop) < 1,
            "patch_size or merge_size": self.factor < 1,
            "min_pixels or max_pixels": self.resize == "native"
            and not 0 < self.min_pixels <= self.max_pixels,
            "rescale_factor": not 0 < self.scale < math.inf,
            "image_mean": len(self.mean) != 3 or not all(map(math.isfinite, self.mean)),
            "image_std": len(self.std) != 3 or not all(0 < value < math.inf for value in self.std),
        }
        for name, is_wrong in wrong.items():
            if is_wrong:
                raise DataError(
                    f"{where}: {name} makes no sense ({self}); use the file that came with the tower"
                )

    def target(self, width: int, height: int) -> tuple[int, int]:
        """(height, width) that an image is resized to, before any crop; DataError for a shape without one."""
        if self.resize == "none":
            return height, width
        if self.resize == "square":
            return self.height, self.width
        if self.resize == "native":
            return smart_resize(width, height, self.factor, self.min_pixels, self.max_pixels)
        short, long = min(width, height), max(width, height)
        longest = int(self.height * long / short)  # truncated, as transformers does
        return (self.height, longest) if width >= height else (longest, self.height)


def smart_resize(width: int, height: int, factor: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """Qwen2-VL's rule: multiples of `factor`, the pixel count within bounds, the aspect ratio nearly kept.

    Returns (height, width). Raises DataError for a side more than 200 times the other
    (transformers, models/qwen2_vl/image_processing_qwen2_vl.py).
    """
    if max(width, height) > 200 * min(width, height):
        raise DataError(
            f"an image of {width} x {height} pixels is longer than 200:1; crop it or drop its record"
        )
    rows, columns = round(height / factor) * factor, round(width / factor) * factor
    if rows * columns > max_pixels:
        shrink = (height * width / max_pixels) ** 0.5
        rows = max(factor, int(height / shrink / factor) * factor)
        columns = max(factor, int(width / shrink / factor) * factor)
    elif rows * columns < min_pixels:
        grow = (min_pixels / (height * width)) ** 0.5
        rows = -int(-height * grow // factor) * factor
        columns = -int(-width * grow // factor) * factor
    return rows, columns


def read_processor(make: Callable[[], Any], settings: Callable[[Any], PixelSettings], where: str) -> Any:
    """(processor, its settings): what transformers makes of a config; DataError for one that says nothing sensible."""
    try:
        processor = make()
        found = settings(processor)
        found.check(where)
    except DataError:
        raise
    except Exception as error:  # whatever a value of the wrong kind provokes in transformers
        raise DataError(
            f"{where}: no settings of an image processor ({type(error).__name__}: {reason(error)}); "
            "use the file that came with the tower"
        ) from None
    return processor, found


def fixed_settings(processor: Any, where: str) -> PixelSettings:
    """The settings of a transformers image processor with a fixed output size; DataError for one without."""
    crop = processor.crop_size if processor.do_center_crop else None
    size = processor.size
    if crop is None and not (size.get("height") and size.get("width")):
        raise DataError(f"{where}: images of size {dict(size)} have no fixed shape; give height and width")
    shortest = None if size.get("height") else size.get("shortest_edge")
    edge = int(shortest or 0)
    if not processor.do_resize:
        raise DataError(f"{where}: do_resize is false, so images have no fixed shape; set it to true")
    return PixelSettings(
        resize="shortest" if shortest else "square",
        height=edge or int(size["height"]),
        width=edge or int(size["width"]),
        crop=None if crop is None else (int(crop["height"]), int(crop["width"])),
        **normalisation(processor),
    )


def native_settings(processor: Any) -> PixelSettings:
    """The settings of transformers' Qwen2-VL image processor; ValueError for a patch that is no number of pixels."""
    for name in ("patch_size", "merge_size", "temporal_patch_size"):
        value = getattr(processor, name)
        if type(value) is not int or value < 1:
            raise ValueError(f"{name} is {value!r}")
    if not processor.do_resize:
        raise ValueError("do_resize is false, so sides are no whole patches")
    return PixelSettings(
        resize="native",
        height=0,
        width=0,
        crop=None,
        factor=processor.patch_size * processor.merge_size,
        min_pixels=int(processor.size["shortest_edge"]),
        max_pixels=int(processor.size["longest_edge"]),
        **normalisation(processor),
    )


def normalisation(processor: Any) -> dict[str, Any]:
    """The filter, scale, mean and standard deviation of a transformers image processor, as fields of the settings."""
    mean = tuple(processor.image_mean) if processor.do_normalize else (0.0, 0.0, 0.0)
    std = tuple(processor.image_std) if processor.do_normalize else (1.0, 1.0, 1.0)
    return {
        "resample": FILTERS[int(processor.resample)],
        "scale": float(processor.rescale_factor) if processor.do_rescale else 1.0,
        "mean": mean,
        "std": std,
    }
