"""Shapes and weights of the vision towers, from a directory's `config.json` or as published.

The weights are listed as transformers names them and as `model/vision_encoders.py` and `model/native_encoders.py`
leave them: without pooling heads, and without what `vision_layer` cuts off.
"""

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from laver_mcore.config.hugging_face import read_config_json
from laver_mcore.config.schema import VisionConfig
from laver_mcore.config.towers import tower_named
from laver_mcore.config.towers.spec import TowerNames, TowerShape


@functools.cache
def tower_shape(vision: VisionConfig) -> TowerShape | None:
    """The recipe's tower, from `vision_path/config.json` where that exists; None for a path without a tower."""
    tower = vision.tower
    if tower is None:
        return None
    return shape_of(tower.name, read_settings(vision.vision_path) or tower.published, vision.vision_layer)


def read_settings(path: str | None, part: str = "vision_config") -> dict[str, Any]:
    """The tower's settings in a directory's `config.json`, which may be `part` of them; none without a directory."""
    if path is None or not (Path(path) / "config.json").is_file():
        return {}
    whole = read_config_json(path)
    return dict(whole.get(part, whole))


def shape_of(kind: str, found: Any, layer: int) -> TowerShape:
    """A tower with these settings, cut at `layer` (-1: whole)."""
    tower = tower_named(kind)
    return tower.shape(tower, tower.filled(found), layer)


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
    width, names = shape.width, tower_named(shape.kind).names
    yield from linear(names.patches, width, shape.patch_numbers, biases=names.patch_biases)
    for name, count in names.prefix:
        yield name, (count, width) if count else (width,), None
    if shape.positions:
        assert names.positions is not None
        yield names.positions, (shape.positions, width), None
    if names.first_norm is not None:
        yield from norm(names.first_norm[0], width, names.first_norm[1])
    for layer in range(shape.layers):
        yield from _layer(shape, names, f"{names.layers}.{layer}")
    if shape.final_norm and names.final_norm is not None:
        yield from norm(names.final_norm[0], width, names.final_norm[1])
    if shape.merge > 1:
        yield from norm("merger.ln_q", width, names.merger_norm_bias)
        merged = width * shape.merge**2
        yield from linear("merger.mlp.0", merged, merged, by="visual")
        yield from linear("merger.mlp.2", shape.output_width, merged, by="visual")


def _layer(shape: TowerShape, names: TowerNames, prefix: str) -> Iterator[Entry]:
    width, ffn, mlp = shape.width, shape.ffn, f"{prefix}.{names.mlp}"
    yield from norm(f"{prefix}.{names.norms[0]}", width, names.norm_biases)
    for projection in names.projections:
        rows = 3 * width if projection == "qkv" else width
        yield from linear(f"{prefix}.{names.attention}.{projection}", rows, width, shape.biases)
    if names.layer_scale:
        yield f"{prefix}.layer_scale1.lambda1", (width,), None
    yield from norm(f"{prefix}.{names.norms[1]}", width, names.norm_biases)
    if not shape.gated:
        yield from linear(f"{mlp}.fc1", ffn, width)
        yield from linear(f"{mlp}.fc2", width, ffn)
    else:
        for projection in ("gate_proj", "up_proj"):
            yield from linear(f"{mlp}.{projection}", ffn, width, shape.biases)
        yield from linear(f"{mlp}.down_proj", width, ffn, shape.biases)
    if names.layer_scale:
        yield f"{prefix}.layer_scale2.lambda1", (width,), None
