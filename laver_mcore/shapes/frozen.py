"""Shapes and weights of frozen encoders that give targets (`model/frozen_encoders.py`)."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from laver_mcore.config.errors import ConfigError
from laver_mcore.config.hugging_face import read_mapping
from laver_mcore.config.targets import TOWER_LAYER, TargetEncoder, square_side
from laver_mcore.config.towers import tower_named
from laver_mcore.config.towers.spec import TowerShape
from laver_mcore.shapes.towers import Entry, linear, norm, read_settings, shape_of, tower_weights

# What transformers takes where a directory's config.json leaves a setting out, which is SAM ViT-B.
_SAM: dict[str, Any] = dict(hidden_size=768, output_channels=256, num_hidden_layers=12, num_attention_heads=12,
                            image_size=1024, patch_size=16, window_size=14, global_attn_indexes=(2, 5, 8, 11),
                            mlp_ratio=4)  # fmt: skip
# DINOv2 ViT-B/14, which Depth Anything V2's base has as well, CLIP-L/14-336 and SigLIP2-so400m/14-384.
_PUBLISHED: dict[str, dict[str, Any]] = {
    "dinov2": dict(hidden_size=768, num_hidden_layers=12, num_attention_heads=12, image_size=518),
    "clip": dict(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, image_size=336, patch_size=14
    ),
    "siglip": dict(
        hidden_size=1152, intermediate_size=4304, num_hidden_layers=27, image_size=384, patch_size=14
    ),
}
_RADIO_L = TowerShape(kind="siglip", width=1024, layers=24, ffn=4096, gated=False, patch_numbers=3 * 16**2,
                      positions=128**2, prefix_tokens=8, merge=1, output_width=1024, final_norm=True)  # fmt: skip
"""C-RADIOv2-L, whose directory only its own code can read: an account of any other RADIO is this one's."""


def frozen_shape(target: TargetEncoder) -> TowerShape:
    """The encoder from its directory, or as published, with as many tokens as its input has patches."""
    part = "backbone_config" if target.kind == "depth_anything" else "vision_config"
    patch = read_settings(target.path, part).get("patch_size", target.published.patch_size)
    tokens = (input_side(target) // patch) ** 2
    if target.kind == "radio":
        return replace(_RADIO_L, fixed_tokens=tokens)
    if target.kind == "sam":
        given = _SAM | read_settings(target.path)
        width = given["hidden_size"]
        return TowerShape(
            kind="sam",
            width=width,
            layers=given["num_hidden_layers"],
            ffn=given.get("mlp_dim") or int(width * given["mlp_ratio"]),
            gated=False,
            patch_numbers=3 * given["patch_size"] ** 2,
            positions=(given["image_size"] // given["patch_size"]) ** 2,
            prefix_tokens=0,
            merge=1,
            output_width=given["output_channels"],
            final_norm=False,
            window=given["window_size"],
            full_layers=len(given["global_attn_indexes"]),
            fixed_tokens=tokens,
            heads=given["num_attention_heads"],
        )
    kind = "dinov2" if target.kind == "depth_anything" else target.kind
    given = read_settings(target.path, part) or _PUBLISHED[kind]
    return replace(shape_of(kind, given, TOWER_LAYER[kind]), fixed_tokens=tokens)


def input_side(target: TargetEncoder) -> int:
    """Side in pixels of its square input; ConfigError for one that an encoder with positions of its own cannot take."""
    own = _own_side(target)
    file = Path(target.path) / "preprocessor_config.json" if target.path else None
    asked, side = "target_image_size", target.image_size
    if side is None and file is not None and file.is_file():
        asked, side = str(file), _processor_side(file)
    if own is not None and side not in (None, own):
        raise ConfigError(
            f"{asked} makes images of {side} x {side} pixels, but the {target.kind} encoder of {target.path} takes "
            f"{own} x {own} (image_size in its config.json)"
        )
    return side or own or target.published.image_size


def _own_side(target: TargetEncoder) -> int | None:
    """The only side that the encoder of a directory takes; None where it takes any, or there is no directory."""
    found = read_settings(target.path)
    if not found or target.kind not in ("clip", "siglip", "sam"):
        return None
    filled = _SAM | found if target.kind == "sam" else tower_named(target.kind).filled(found)
    side = filled["image_size"]
    return side if type(side) is int else None


def _processor_side(file: Path) -> int | None:
    try:
        return square_side(read_mapping(file, "the directory of the frozen encoder"))
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"{file}: {error}; use the file that came with the encoder") from None


def frozen_entries(shape: TowerShape) -> Iterator[Entry]:
    """Every weight of it."""
    return _sam_weights(shape) if shape.kind == "sam" else tower_weights(shape)


def _sam_weights(shape: TowerShape) -> Iterator[Entry]:
    width, side = shape.width, round(shape.positions**0.5)
    yield from linear("patch_embed.projection", width, shape.patch_numbers)
    yield "pos_embed", (shape.positions, width), None
    for layer in range(shape.layers):
        # Which layers see the whole image does not matter to a sum.
        whole = layer >= shape.layers - shape.full_layers
        yield from norm(f"layers.{layer}.layer_norm1", width)
        yield from linear(f"layers.{layer}.attn.qkv", 3 * width, width)
        yield from linear(f"layers.{layer}.attn.proj", width, width)
        table = (2 * (side if whole else shape.window) - 1, width // shape.heads)
        for axis in "hw":
            yield f"layers.{layer}.attn.rel_pos_{axis}", table, None
        yield from norm(f"layers.{layer}.layer_norm2", width)
        yield from linear(f"layers.{layer}.mlp.lin1", shape.ffn, width)
        yield from linear(f"layers.{layer}.mlp.lin2", width, shape.ffn)
    neck = shape.output_width
    yield "neck.conv1.weight", (neck, width), "patches"
    yield from norm("neck.layer_norm1", neck)
    yield "neck.conv2.weight", (neck, neck * 9), "patches"
    yield from norm("neck.layer_norm2", neck)


def window_pairs(shape: TowerShape) -> int:
    """(query, key) pairs of one image in a layer with windows, which pad the image to whole ones."""
    if not shape.window or shape.fixed_tokens is None:
        return 0
    side = round(shape.fixed_tokens**0.5)
    return (-(-side // shape.window)) ** 2 * shape.window**4
