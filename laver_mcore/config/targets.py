"""A frozen vision encoder that gives an objective its targets: which one, and how it looks at an image."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

TargetKind = Literal["dinov2", "clip", "siglip", "sam", "depth_anything", "radio"]

TOWER_LAYER = {"dinov2": -1, "clip": -2, "siglip": -1}
"""State that is the target: DINOv2's and SigLIP's after their final norm, CLIP's as LLaVA reads it."""


@dataclass(frozen=True)
class PublishedTarget:
    """What is taken where there is no directory, for a plan without the download."""

    width: int
    image_size: int
    patch_size: int


PUBLISHED_TARGETS = {
    "dinov2": PublishedTarget(768, 224, 14),  # ViT-B/14, which VIRAL uses
    "clip": PublishedTarget(1024, 336, 14),
    "siglip": PublishedTarget(1152, 384, 14),
    "sam": PublishedTarget(256, 1024, 16),
    "depth_anything": PublishedTarget(768, 518, 14),  # V2-Base
    "radio": PublishedTarget(1024, 432, 16),  # C-RADIOv2-L
}


@dataclass(frozen=True, kw_only=True)
class TargetEncoder:
    """A frozen encoder, or a cache of what it saw."""

    kind: TargetKind
    path: str | None = None
    """Hugging Face directory: config, weights, preprocessor_config.json."""
    cache: str | None = None
    """Directory of features made by laver prepare-targets; the encoder itself is not loaded then."""
    image_size: int | None = None
    """Side in pixels of its input; its own processor's by default."""
    random_init: bool = False
    remote_code: bool = False
    """Run the Python files of the directory (RADIO)."""
    width: int | None = None
    """Numbers of a feature, where the directory's config does not say (RADIO)."""

    @property
    def published(self) -> PublishedTarget:
        return PUBLISHED_TARGETS[self.kind]


def square_side(processor: Mapping[str, Any]) -> int | None:
    """Side in pixels of the square that a `preprocessor_config.json` makes; None where it names none, ValueError where
    it is no number.
    """
    cropped = processor.get("do_center_crop") and processor.get("crop_size")
    size = cropped or processor.get("size") or {}
    if isinstance(size, Mapping):
        size = next(
            (size[name] for name in ("height", "longest_edge", "shortest_edge") if size.get(name)), None
        )
    if size is not None and (type(size) is not int or size < 1):
        raise ValueError(f"a side of {size!r} pixels")
    return size
