"""Native resolution as Qwen2-VL reads it: images keep their shape, patches are merged 2 x 2.

Shapes: P = patches of all images, C = channels, t = temporal_patch_size (frames; a picture is repeated), p =
patch size, m = merge_size; an image of H x W pixels has H W / p^2 patches and H W / (p m)^2 visual tokens.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from laver_mcore.config.errors import ConfigError
from laver_mcore.config.hugging_face import read_config_json
from laver_mcore.data.errors import DataError
from laver_mcore.data.images.pixel_settings import native_settings, read_processor
from laver_mcore.data.images.processors import normalise, pillow_class, preprocessor_config

NATIVE_PROCESSORS = ("Qwen2VLImageProcessor",)


class NativeImageProcessor:
    """Variable grids, pixels [P, C * t * p * p] by transformers' own Qwen2-VL processor.

    The m * m patches of one visual token follow each other; visual tokens go row by row, image by image.
    """

    def __init__(self, source: str | Path | dict[str, Any]) -> None:
        config, where = preprocessor_config(source)
        name = str(config.get("image_processor_type", "")).removesuffix("Fast").removesuffix("Pil")
        if name not in NATIVE_PROCESSORS:
            raise DataError(
                f"{where}: image processor {name!r} has no native resolution; use one of "
                f"{', '.join(NATIVE_PROCESSORS)}"
            )
        self._processor, self.settings = read_processor(
            lambda: pillow_class(name).from_dict({**config, "do_convert_rgb": True}), native_settings, where
        )
        self._config = json.dumps(config, sort_keys=True, default=str)
        self.patch_size = int(self._processor.patch_size)
        self.merge_size = int(self._processor.merge_size)
        self.temporal_patch_size = int(self._processor.temporal_patch_size)

    @property
    def patch_dim(self) -> int:
        """Numbers in one patch: C * t * p * p."""
        return 3 * self.temporal_patch_size * self.patch_size**2

    def grid(self, width: int, height: int) -> tuple[int, int]:
        """(rows, columns) of visual tokens, merged; DataError beyond an aspect ratio of 200."""
        rows, columns = self.settings.target(width, height)
        return rows // self.settings.factor, columns // self.settings.factor

    def __call__(self, images: Sequence[Image.Image]) -> Tensor:
        if not images:
            return torch.empty(0, self.patch_dim)
        return self._processor(list(images), return_tensors="pt")["pixel_values"]

    def finish(self, resized: Sequence[Tensor]) -> Tensor:
        patches = [self._patches(normalise(image_CHW, self.settings)) for image_CHW in resized]
        return torch.cat(patches) if patches else torch.empty(0, self.patch_dim)

    def _patches(self, image_CHW: Tensor) -> Tensor:
        p, m = self.patch_size, self.merge_size
        _, height, width = image_CHW.shape
        blocks = image_CHW.reshape(3, height // (p * m), m, p, width // (p * m), m, p)
        patches = blocks.permute(1, 4, 2, 5, 0, 3, 6).unsqueeze(5)  # rows, columns, m, m, C, 1, p, p
        repeated = patches.expand(-1, -1, -1, -1, -1, self.temporal_patch_size, -1, -1)
        return repeated.reshape(-1, self.patch_dim)

    def fingerprint(self) -> str:
        """Text naming everything that changes the pixels."""
        return f"NativeImageProcessor({self._config})"


def native_processor(
    rules: str, path: str | Path, *, min_pixels: int | None = None, max_pixels: int | None = None
) -> NativeImageProcessor:
    """The processor of a tower's directory; `rules`, qwen or aimv2, is `TowerSpec.native`."""
    return NativeImageProcessor(native_settings_of(rules, path, min_pixels=min_pixels, max_pixels=max_pixels))


def native_settings_of(
    rules: str, path: str | Path, *, min_pixels: int | None = None, max_pixels: int | None = None
) -> dict[str, Any]:
    """Settings of Qwen2-VL's image processor for a tower's directory, with other bounds of an image's area if given."""
    settings = _settings_of(rules, path)
    if min_pixels is None and max_pixels is None:
        return settings
    bounds = native_settings(
        pillow_class(NATIVE_PROCESSORS[0]).from_dict({**settings, "do_convert_rgb": True})
    )
    low = bounds.min_pixels if min_pixels is None else min_pixels
    high = bounds.max_pixels if max_pixels is None else max_pixels
    size = {"shortest_edge": low, "longest_edge": high}  # as published files since Qwen2.5-VL name them
    return {**settings, "min_pixels": low, "max_pixels": high, "size": size}


def _settings_of(rules: str, path: str | Path) -> dict[str, Any]:
    """Settings of Qwen2-VL's image processor for a tower's directory, as it comes.

    Published AIMv2 directories have CLIP's processor, which crops to one size. Their mean and deviation are
    kept, and images go through Qwen2-VL's rules: both sides a multiple of the patch, the area between
    `min_pixels` and `max_pixels` of preprocessor_config.json (4 to 1,024 patches where it does not say).
    """
    given, where = preprocessor_config(path)
    if rules != "aimv2":
        return {"merge_size": 2, **given}
    if "image_mean" not in given or "image_std" not in given:
        raise DataError(f"{where}: image_mean or image_std is missing; use the file that came with the tower")
    try:
        tower = read_config_json(path, "a Hugging Face directory for vision_path")
    except ConfigError as error:
        raise DataError(str(error)) from None
    patch = int(tower.get("vision_config", tower).get("patch_size", 14))
    return {
        "image_processor_type": "Qwen2VLImageProcessor",
        "patch_size": patch,
        "merge_size": 1,
        "temporal_patch_size": 1,
        "min_pixels": given.get("min_pixels", 4 * patch**2),
        "max_pixels": given.get("max_pixels", 1024 * patch**2),
        "image_mean": given["image_mean"],
        "image_std": given["image_std"],
    }
