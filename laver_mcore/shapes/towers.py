"""Shapes and weights of the vision towers, from a directory's `config.json` or as published.

The weights are listed as transformers names them and as `model/vision_encoders.py` and `model/native_encoders.py`
leave them: without pooling heads, and without what `vision_layer` cuts off.
"""

import functools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from laver_mcore.config.schema import VisionConfig

_COMMON = dict(num_channels=3, use_swiglu_ffn=False, mlp_ratio=4, temporal_patch_size=1)
# What transformers takes where a directory's config.json leaves a setting out.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "siglip": dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12,
                   image_size=224, patch_size=16),
    "clip": dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12,
                 image_size=224, patch_size=32),
    "dinov2": dict(hidden_size=768, num_hidden_layers=12, num_attention_heads=12, image_size=224, patch_size=14),
    "aimv2": dict(hidden_size=1024, intermediate_size=2816, num_hidden_layers=24, num_attention_heads=8,
                  image_size=224, patch_size=14, qkv_bias=False, mlp_bias=False),
    "qwen2-vl": dict(embed_dim=1280, hidden_size=3584, depth=32, num_heads=16, patch_size=14,
                     temporal_patch_size=2, spatial_merge_size=2),
    "qwen2.5-vl": dict(hidden_size=3584, intermediate_size=3420, out_hidden_size=3584, depth=32, num_heads=16,
                       patch_size=14, temporal_patch_size=2, spatial_merge_size=2, window_size=112,
                       fullatt_block_indexes=(7, 15, 23, 31)),
}  # fmt: skip
# The published towers that the recipes name, for a plan without the download: SigLIP2-so400m/14-384, CLIP-L/14-336,
# DINOv2-L/14, AIMv2-L/14 native, and the towers of Qwen2-VL-7B and Qwen2.5-VL-7B.
_PUBLISHED: dict[str, dict[str, Any]] = {
    "siglip": dict(hidden_size=1152, intermediate_size=4304, num_hidden_layers=27, num_attention_heads=16,
                   image_size=384, patch_size=14),
    "clip": dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16,
                 image_size=336, patch_size=14),
    "dinov2": dict(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, image_size=518),
    "aimv2": {},
    "qwen2-vl": {},
    "qwen2.5-vl": dict(hidden_size=1280),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class TowerShape:
    """A tower as arithmetic needs it. Patches are before the merger, visual tokens behind it."""

    kind: str
    width: int
    layers: int
    ffn: int
    gated: bool
    """SwiGLU: three matrices in the MLP instead of two."""
    patch_numbers: int
    """Numbers in one patch: channels x frames x pixels."""
    positions: int
    """Rows of the learned position table; 0 where positions are computed."""
    prefix_tokens: int
    """CLS tokens an image has besides its patches."""
    merge: int
    """Patches per side of one visual token."""
    output_width: int
    final_norm: bool
    biases: bool = True
    window: int = 0
    """Side in visual tokens of an attention window; 0 is attention over the whole image in every layer."""
    full_layers: int = 0
    """Layers that see the whole image although there are windows."""
    fixed_tokens: int | None = None
    """Visual tokens of every image; None at native resolution."""
    heads: int = 0
    """Attention heads, where weights depend on them (SAM's relative positions)."""


@functools.cache
def tower_shape(vision: VisionConfig) -> TowerShape | None:
    """The recipe's tower, from `vision_path/config.json` where that exists; None for a path without a tower."""
    kind = vision.vision
    if kind not in _DEFAULTS:
        return None
    return shape_of(kind, read_settings(vision.vision_path) or _PUBLISHED[kind], vision.vision_layer)


def read_settings(path: str | None, part: str = "vision_config") -> dict[str, Any]:
    """The tower's settings in a directory's `config.json`, which may be `part` of them; none without a directory."""
    file = Path(path) / "config.json" if path else None
    if file is None or not file.is_file():
        return {}
    whole = json.loads(file.read_text(encoding="utf-8"))
    return dict(whole.get(part, whole))


def shape_of(kind: str, found: dict[str, Any], layer: int) -> TowerShape:
    """A tower with these settings, cut at `layer` (-1: whole)."""
    given = {**_COMMON, **_DEFAULTS[kind], **{k: v for k, v in found.items() if v is not None}}
    if kind in ("qwen2-vl", "qwen2.5-vl"):
        return _qwen_shape(kind, given)
    width, patch = given["hidden_size"], given["patch_size"]
    side = given["image_size"] // patch
    native = kind == "aimv2"
    return TowerShape(
        kind=kind,
        width=width,
        layers=given["num_hidden_layers"] + (0 if native else layer + 1),
        ffn=_dinov2_ffn(given) if kind == "dinov2" else given["intermediate_size"],
        gated=native or given["use_swiglu_ffn"],
        patch_numbers=given["num_channels"] * patch**2,
        positions=0 if native else side**2 + (kind != "siglip"),
        prefix_tokens=int(kind in ("clip", "dinov2")),
        merge=1,
        output_width=width,
        final_norm=native or (kind != "clip" and layer == -1),
        biases=not native or given["mlp_bias"],
        fixed_tokens=None if native else side**2,
    )


def _dinov2_ffn(given: dict[str, Any]) -> int:
    inner = int(given["hidden_size"] * given["mlp_ratio"])
    return (int(inner * 2 / 3) + 7) // 8 * 8 if given["use_swiglu_ffn"] else inner


def _qwen_shape(kind: str, given: dict[str, Any]) -> TowerShape:
    windowed = kind == "qwen2.5-vl"
    width = given["hidden_size" if windowed else "embed_dim"]
    merge, patch = given["spatial_merge_size"], given["patch_size"]
    channels = given.get("in_channels", given["num_channels"])
    return TowerShape(
        kind=kind,
        width=width,
        layers=given["depth"],
        ffn=given["intermediate_size"] if windowed else int(width * given["mlp_ratio"]),
        gated=windowed,
        patch_numbers=channels * given["temporal_patch_size"] * patch**2,
        positions=0,
        prefix_tokens=0,
        merge=merge,
        output_width=given["out_hidden_size" if windowed else "hidden_size"],
        final_norm=False,
        window=given["window_size"] // merge // patch if windowed else 0,
        full_layers=len(given["fullatt_block_indexes"]) if windowed else 0,
    )


Entry = tuple[str, tuple[int, ...], str | None]
"""Name, shape, and which rows a matrix is multiplied with: "patches", "visual", or None for what is no matrix."""


def linear(name: str, rows: int, columns: int, biases: bool = True, by: str = "patches") -> Iterator[Entry]:
    """A linear layer's weight and bias."""
    yield f"{name}.weight", (rows, columns), by
    if biases:
        yield f"{name}.bias", (rows,), None


def norm(name: str, width: int, biases: bool = True) -> Iterator[Entry]:
    """A norm's weight and bias."""
    yield f"{name}.weight", (width,), None
    if biases:
        yield f"{name}.bias", (width,), None


def tower_weights(shape: TowerShape) -> Iterator[Entry]:
    """Every weight of the tower in the order of its forward pass, names below `vision_encoder.tower.`.

    The patch projection's kernel is given as the matrix it is, [width, numbers of a patch].
    """
    width = shape.width
    name, layer_norms = _PATCHES[shape.kind]
    yield from linear(name, width, shape.patch_numbers, biases=shape.kind in ("siglip", "dinov2", "aimv2"))
    if shape.prefix_tokens:
        yield (
            ("embeddings.cls_token" if shape.kind == "dinov2" else "embeddings.class_embedding"),
            (width,),
            None,
        )
    if shape.positions:
        table = "position_embeddings" if shape.kind == "dinov2" else "position_embedding.weight"
        yield f"embeddings.{table}", (shape.positions, width), None
    if shape.kind == "clip":
        yield from norm("pre_layrnorm", width, True)
    if shape.kind == "aimv2":
        yield from norm("embeddings.rms_norm", width, False)
    for layer in range(shape.layers):
        yield from _layer(shape, layer_norms, layer)
    if shape.final_norm:
        final = {"siglip": "post_layernorm", "dinov2": "layernorm", "aimv2": "rms_norm"}[shape.kind]
        yield from norm(final, width, shape.kind != "aimv2")
    if shape.merge > 1:
        yield from norm("merger.ln_q", width, shape.kind == "qwen2-vl")
        merged = width * shape.merge**2
        yield from linear("merger.mlp.0", merged, merged, by="visual")
        yield from linear("merger.mlp.2", shape.output_width, merged, by="visual")


# Kind -> name of the patch projection, and (the list of layers, attention, its outputs, MLP, norms).
_PATCHES: dict[str, tuple[str, tuple[str, str, tuple[str, ...], str, tuple[str, str]]]] = {
    "siglip": ("embeddings.patch_embedding", ("encoder.layers", "self_attn", ("k_proj", "v_proj", "q_proj", "out_proj"),
                                              "mlp", ("layer_norm1", "layer_norm2"))),
    "dinov2": ("embeddings.patch_embeddings.projection",
               ("encoder.layer", "attention", ("q_proj", "k_proj", "v_proj", "o_proj"), "mlp", ("norm1", "norm2"))),
    "aimv2": ("embeddings.patch_embed", ("encoder.layers", "attention", ("k_proj", "v_proj", "q_proj", "out_proj"),
                                         "ffn", ("rms_norm1", "rms_norm2"))),
    "qwen2-vl": ("patch_embed.proj", ("blocks", "attn", ("qkv", "proj"), "mlp", ("norm1", "norm2"))),
}  # fmt: skip
_PATCHES["qwen2.5-vl"] = _PATCHES["qwen2-vl"]
_PATCHES["clip"] = (
    "embeddings.patch_embedding",
    ("encoder.layers", "self_attn", _PATCHES["siglip"][1][2], "mlp", ("layer_norm1", "layer_norm2")),
)


def _layer(shape: TowerShape, names: tuple, layer: int) -> Iterator[Entry]:
    layers, attention, projections, mlp, (norm1, norm2) = names
    prefix, width, ffn = f"{layers}.{layer}", shape.width, shape.ffn
    norm_biases = shape.kind not in ("aimv2", "qwen2.5-vl")
    yield from norm(f"{prefix}.{norm1}", width, norm_biases)
    for projection in projections:
        rows = 3 * width if projection == "qkv" else width
        yield from linear(f"{prefix}.{attention}.{projection}", rows, width, shape.biases)
    if shape.kind == "dinov2":
        yield f"{prefix}.layer_scale1.lambda1", (width,), None
    yield from norm(f"{prefix}.{norm2}", width, norm_biases)
    if not shape.gated:
        yield from linear(f"{prefix}.{mlp}.fc1", ffn, width)
        yield from linear(f"{prefix}.{mlp}.fc2", width, ffn)
    else:
        for projection in ("gate_proj", "up_proj"):
            yield from linear(f"{prefix}.{mlp}.{projection}", ffn, width, shape.biases)
        yield from linear(f"{prefix}.{mlp}.down_proj", width, ffn, shape.biases)
    if shape.kind == "dinov2":
        yield f"{prefix}.layer_scale2.lambda1", (width,), None
