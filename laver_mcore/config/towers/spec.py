"""What a vision tower is: everything in which SigLIP, CLIP, DINOv2, AIMv2 and Qwen's towers differ, as plain data.

All are stacks of transformer layers over patches; transformers' own classes compute them.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

Settings = Mapping[str, Any]
"""The tower's part of a config.json, with what it leaves out filled in."""


@dataclass(frozen=True, kw_only=True)
class TowerShape:
    """A tower as arithmetic needs it. Patches are before the merger, visual tokens behind it."""

    kind: str
    """Name of its `TowerSpec`."""
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
    """Tokens an image has besides its patches, in front of them: a CLS token, registers."""
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


@dataclass(frozen=True, kw_only=True)
class TowerNames:
    """How transformers names a tower's weights, in the order of its forward pass."""

    patches: str
    """The patch projection."""
    patch_biases: bool = False
    prefix: tuple[tuple[str, int], ...] = ()
    """Learned tokens in front of the patches: (name, how many; 0 is one without an axis of its own)."""
    positions: str | None = None
    first_norm: tuple[str, bool] | None = None
    """A norm before the first layer: (name, whether it has a bias)."""
    layers: str
    """The list of layers."""
    attention: str
    projections: tuple[str, ...]
    mlp: str
    norms: tuple[str, str]
    norm_biases: bool = True
    layer_scale: bool = False
    """Learned factors of what attention and MLP add."""
    final_norm: tuple[str, bool] | None = None
    merger_norm_bias: bool = False


@dataclass(frozen=True, kw_only=True, eq=False)
class TowerSpec:
    """One entry of the registry of towers."""

    name: str
    """By which a recipe calls it, `vision.vision`."""
    model_types: tuple[str, ...]
    """`model_type` of a whole checkpoint's config.json and of its vision half."""
    package: str
    """Of transformers.models."""
    model: str
    """Its class there."""
    settings: str
    """Its configuration's class there."""
    defaults: Settings
    """What transformers takes where config.json leaves a setting out."""
    published: Settings
    """The published tower that the recipes name, for a plan without the download."""
    names: TowerNames
    shape: Callable[["TowerSpec", Settings, int], TowerShape]
    """(spec, settings, layer that is read) -> the tower as arithmetic needs it."""

    layers: str = "layers"
    """Fixed resolution: the encoder's list of layers, ..."""
    final_norm: str = ""
    """... the norm behind them, ..."""
    norms_last_state: bool = True
    """... and whether the last state is behind it (CLIP norms the pooled token alone)."""
    prefix_tokens: Callable[[Settings], int] = lambda settings: 0
    """How many tokens stand in front of the patches."""
    has_cls: bool = False
    """Whether the first of them is a CLS token."""
    any_size: bool = False
    """Whether positions are interpolated to other sizes than the tower's own."""

    native: Literal["qwen", "aimv2"] | None = None
    """Native resolution: how images of several shapes run as one sequence (`model/native_encoders.py`)."""
    weights_below: str = ""
    """Prefix of the tower's weights inside a whole checkpoint; ..."""
    other_parts: tuple[str, ...] = ()
    """... beginnings of names there that are not the tower's. Any other name is refused."""

    def filled(self, found: Settings) -> dict[str, Any]:
        """The settings of a config.json with what it leaves out."""
        return {**self.defaults, **{name: value for name, value in found.items() if value is not None}}
