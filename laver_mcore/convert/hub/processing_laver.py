"""Images and chat text -> what an exported LaVer model takes: pixels, and one <|image_pad|> per visual
token.
"""

from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from transformers import BatchFeature, ProcessorMixin
from transformers.image_processing_utils import BaseImageProcessor


def to_rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB, transparency on white, as in training."""
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


class LaverImageProcessor(BaseImageProcessor):
    """The tower's own processor on Pillow, or a square cut into flattened patches.

    `tower` is the content of the tower's preprocessor_config.json; without one, `image_size` and `patch_size`
    are the sides in pixels of the square and of a patch.
    """

    model_input_names = ["pixel_values", "image_grids"]  # noqa: RUF012

    def __init__(
        self,
        tower: dict[str, Any] | None = None,
        image_grid: list[int] | tuple[int, int] | None = (1, 1),
        image_size: int = 0,
        patch_size: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.tower = tower
        self.image_grid = None if image_grid is None else list(image_grid)
        self.image_size = image_size
        self.patch_size = patch_size

    def __call__(self, images: Any, return_tensors: str | None = "pt", **_: Any) -> BatchFeature:
        """`pixel_values` [I, 3, H, W] or flattened patches, and `image_grids` [I, 2] in visual tokens."""
        images = [to_rgb(image) for image in flatten(images)]
        grids = torch.tensor([self.image_grid or [0, 0]] * len(images))
        if self.tower is None:
            return BatchFeature({"pixel_values": self._patches(images), "image_grids": grids})
        found = self._tower_features(images)
        if self.image_grid is None:
            grids = found["image_grid_thw"][:, 1:] // self.tower["merge_size"]
        return BatchFeature({"pixel_values": found["pixel_values"], "image_grids": grids})

    def preprocess(self, images: Any, **kwargs: Any) -> BatchFeature:
        return self(images, **kwargs)

    def _tower_features(self, images: list[Image.Image]) -> Any:
        assert self.tower is not None
        name = self.tower.get("image_processor_type", self.tower.get("feature_extractor_type", ""))
        name = (
            name.removesuffix("Fast")
            .removesuffix("Pil")
            .replace("CLIPFeatureExtractor", "CLIPImageProcessor")
        )
        # Pillow and torchvision resize differently; the model was trained on Pillow's pixels.
        kind = getattr(transformers, f"{name}Pil", None) or getattr(transformers, name)
        processor = kind.from_dict({**self.tower, "do_convert_rgb": True})
        return processor(images, return_tensors="pt")

    def _patches(self, images: list[Image.Image]) -> torch.Tensor:
        size, p = self.image_size, self.patch_size
        side = size // p
        patches = []
        for image in images:
            if image.size != (size, size):
                image = image.resize((size, size), Image.Resampling.BICUBIC)
            pixels = np.asarray(image).reshape(side, p, side, p, 3).transpose(0, 2, 4, 1, 3)
            patches.append(torch.from_numpy(pixels.reshape(side * side, 3 * p * p).copy()))
        return torch.cat(patches).float().div_(127.5).sub_(1.0)


def flatten(images: Any) -> list[Image.Image]:
    """One image, or lists of images nested in any way, as one list."""
    if not isinstance(images, list | tuple):
        return [images]
    return [image for part in images for image in flatten(part)]


class LaverProcessor(ProcessorMixin):
    """`processor(text=..., images=...)`; the text comes from `apply_chat_template`."""

    def __init__(
        self, image_processor: Any = None, tokenizer: Any = None, chat_template: str | None = None
    ) -> None:
        self.image_token = "<|image_pad|>"
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    def __call__(self, images: Any = None, text: Any = None, **kwargs: Any) -> BatchFeature:
        """Token ids and mask of the texts, each <|image_pad|> repeated for its image's tokens, and the
        pixels.
        """
        for name in ("videos", "audio", "common_kwargs", "return_mm_token_type_ids"):
            kwargs.pop(name, None)
        kwargs.setdefault("return_tensors", "pt")
        # A chat template has written everything already.
        kwargs.setdefault("add_special_tokens", False)
        texts = [text] if isinstance(text, str) else list(text)
        features = {} if not images else self.image_processor(images)
        grids = iter(features["image_grids"].tolist() if images else [])
        num_images = len(features["image_grids"]) if images else 0
        places = sum(each.count(self.image_token) for each in texts)
        if places != num_images:
            raise ValueError(f"{places} {self.image_token} in the text, {num_images} image(s)")
        texts = [self._expand(each, grids) for each in texts]
        return BatchFeature({**self.tokenizer(texts, **kwargs), **features})

    def _expand(self, text: str, grids: Any) -> str:
        first, *rest = text.split(self.image_token)
        for part in rest:
            rows, columns = next(grids)
            first += self.image_token * (rows * columns) + part
        return first
