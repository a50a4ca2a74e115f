"""Where visual tokens come from: a fixed-resolution transformers tower, or bare patches.

    pixels [I, 3, H, W] -> VisionEncoder -> [I, N, E]       SigLIP / SigLIP2 (fixed resolution), CLIP, DINOv2
    patches [n, 3 p p]  -> PatchEmbedder -> [n, D]          encoder-free

Shapes: I = images, H, W = pixels, N = tokens of one image, E = tower width, n = visual tokens, p = patch side
in pixels, D = decoder width.

Which state feeds the connector: `layer=-1` is the tower's own `last_hidden_state`, which SigLIP and DINOv2
take after their final layer norm and CLIP before it; `layer=-2` is transformers' `hidden_states[-2]`, without
a final norm, which is LLaVA-1.5's choice for CLIP-L/14-336 and LLaVA-NeXT's for SigLIP (there as "delete the
last layer, take the last"). Layers, norms and heads that the choice leaves unused are removed, so that every
parameter left has a gradient.
"""

import json
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import nn

from laver_mcore.config.errors import ConfigError
from laver_mcore.model.tower_weights import (
    account,
    first_line,
    from_config,
    refuse_non_finite,
    stored_tensors,
)

Select = Literal["patch", "cls_patch"]


class _Tower(NamedTuple):
    model: str  # class in transformers
    config: str
    model_types: tuple[str, ...]  # `model_type` of a whole checkpoint and of its vision half
    layers: str  # the encoder's list of layers
    final_norm: str
    norms_last_hidden_state: bool
    has_cls: bool


_TOWERS: dict[str, _Tower] = {
    "siglip": _Tower(
        "SiglipVisionModel",
        "SiglipVisionConfig",
        ("siglip", "siglip_vision_model"),
        "layers",
        "post_layernorm",
        True,
        False,
    ),
    "clip": _Tower(
        "CLIPVisionModel",
        "CLIPVisionConfig",
        ("clip", "clip_vision_model"),
        "layers",
        "post_layernorm",
        False,
        True,
    ),
    "dinov2": _Tower("Dinov2Model", "Dinov2Config", ("dinov2",), "layer", "layernorm", True, True),
}

_OTHER_PARTS = (
    "text_model.", "text_projection.", "visual_projection.", "logit_scale", "logit_bias", "classifier.",
)  # fmt: skip
"""Beginnings of names in a whole checkpoint that are not its vision tower's."""


class VisionEncoder(nn.Module):
    """A transformers vision tower cut at one layer: pixels [I, 3, H, W] -> tokens [I, N, E].

    `grid` is (rows, columns) of patch tokens at the configured image size; a CLS token is dropped or comes
    first. Takes ownership of `tower` and removes what `layer` leaves unused. ValueError if the tower has no
    such layer, or no CLS token where one is selected.
    """

    def __init__(self, kind: str, tower: nn.Module, *, layer: int = -1, select: Select = "patch") -> None:
        super().__init__()
        spec = _spec(kind)
        if select not in ("patch", "cls_patch"):
            raise ConfigError(f"vision_select={select!r}; use 'patch' or 'cls_patch'")
        if select == "cls_patch" and not spec.has_cls:
            raise ConfigError(f"vision_select='cls_patch', but {kind} has no CLS token; use 'patch'")
        config: Any = tower.config
        self.kind = kind
        self.hidden_size: int = config.hidden_size
        self.patch_size: int = config.patch_size
        self.image_size: int = config.image_size
        self.grid = self._grid_of(self.image_size, self.image_size)
        self.num_prefix_tokens = 1 if spec.has_cls else 0
        self.keeps_cls = select == "cls_patch"
        _cut(tower, spec, layer)
        self.tower = tower

    @property
    def num_tokens(self) -> int:
        """Tokens of one image at the configured size, a kept CLS token included."""
        return self.grid[0] * self.grid[1] + self.keeps_cls

    def forward(self, pixels_I3HW: torch.Tensor) -> torch.Tensor:
        """Encode images; none at all gives [0, N, E] with every parameter in the graph, at no cost.

        DINOv2 interpolates its positions to any size of whole patches; the others raise ValueError for
        another size than their own.
        """
        num_images, _, height, width = pixels_I3HW.shape
        if self.kind != "dinov2" and (height, width) != (self.image_size, self.image_size):
            raise ConfigError(
                f"images of {height} x {width} pixels, but this {self.kind} tower takes {self.image_size} x "
                f"{self.image_size}; use the image processor of the tower's own directory"
            )
        if num_images == 0:
            rows, columns = self._grid_of(height, width)
            # Empty slices: a rank without images still gives every parameter its (zero) gradient.
            nothing = torch.cat([parameter.flatten()[:0] for parameter in self.parameters()])
            return nothing.reshape(0, rows * columns + self.keeps_cls, self.hidden_size)
        dtype = next(self.parameters()).dtype
        tokens_INE = self.tower(pixel_values=pixels_I3HW.to(dtype)).last_hidden_state
        return tokens_INE if self.keeps_cls else tokens_INE[:, self.num_prefix_tokens :]

    def grid_of(self, pixels_I3HW: torch.Tensor) -> tuple[int, int]:
        """(rows, columns) of patch tokens of such images."""
        return self._grid_of(*pixels_I3HW.shape[-2:])

    def _grid_of(self, height: int, width: int) -> tuple[int, int]:
        # The patch convolution drops the rest: SigLIP 384 / 14 gives 27 x 27.
        return height // self.patch_size, width // self.patch_size


class PatchEmbedder(nn.Module):
    """Encoder-free visual path: 3-layer GELU MLP on flattened patches [n, 3 p p] -> [n, D]."""

    def __init__(
        self,
        patch_size: int,
        hidden_size: int,
        output_size: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = {"dtype": dtype, "device": device}
        self.layers = nn.Sequential(
            nn.Linear(3 * patch_size**2, hidden_size, **factory),
            nn.GELU(),
            nn.Linear(hidden_size, hidden_size, **factory),
            nn.GELU(),
            nn.Linear(hidden_size, output_size, **factory),
        )

    def forward(self, patches_nP: torch.Tensor) -> torch.Tensor:
        """Embed every patch by itself; n = 0 keeps every parameter in the graph."""
        return self.layers(patches_nP)


def build_vision_encoder(
    kind: str,
    *,
    path: str | Path | None = None,
    config: dict[str, Any] | None = None,
    random_init: bool = False,
    layer: int = -1,
    select: Select = "patch",
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> VisionEncoder:
    """Build a tower from a Hugging Face directory (`path`) or from `config` alone, cut at `layer`.

    Weights are read from safetensors files of `path`; they are random, drawn from `seed`, with `random_init`
    or without `path`. On the meta device nothing is read but the config. ValueError if directory and kind
    disagree.
    """
    import transformers

    spec = _spec(kind)
    device = torch.device(device if device is not None else "cpu")
    model_class = getattr(transformers, spec.model)
    if path is not None and not random_init and device.type != "meta":
        tower = _from_pretrained(kind, model_class, Path(path), dtype)
    else:
        if config is None:
            if path is None:
                raise ConfigError(
                    f"a {kind} tower needs vision_path, a Hugging Face directory with its config.json"
                )
            config = read_config(path, kind)
        where = None if path is None else Path(path) / "config.json"
        tower_config = from_config(getattr(transformers, spec.config), config, where)
        with torch.random.fork_rng(devices=[]), torch.device("meta" if device.type == "meta" else "cpu"):
            torch.manual_seed(seed)
            tower = from_config(model_class, tower_config, where).to(dtype)
    return VisionEncoder(kind, tower, layer=layer, select=select).to(device)


def read_config_file(file: Path) -> dict[str, Any]:
    """Return the JSON object of a tower's `config.json`; ConfigError if it is missing or broken."""
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except OSError:
        raise ConfigError(f"{file}: no such file; vision_path must be a Hugging Face directory") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{file}: broken JSON ({error})") from None
    if not isinstance(settings, dict):
        raise ConfigError(f"{file}: wanted a JSON mapping, got {type(settings).__name__}")
    if not isinstance(settings.get("vision_config", {}), dict):
        raise ConfigError(f"{file}: vision_config={settings['vision_config']!r} is no mapping of settings")
    return settings


def read_config(path: str | Path, kind: str | None = None) -> dict[str, Any]:
    """Return the vision tower's settings from `path/config.json`, whole checkpoint or vision half.

    ValueError if there is no such file, or if it describes a model that `kind` (None: any kind) does not
    name.
    """
    file = Path(path) / "config.json"
    whole = read_config_file(file)
    found = whole.get("model_type")
    kinds = [kind] if kind is not None else list(_TOWERS)
    wanted = [name for each in kinds for name in _spec(each).model_types]
    if found not in wanted:
        others = [each for each, spec in _TOWERS.items() if found in spec.model_types]
        fix = (
            f"set vision to {others[0]!r}"
            if others
            else f"supported are {', '.join(_TOWERS)} at fixed resolution"
        )
        raise ConfigError(f"{file}: model_type={found!r}, wanted {' or '.join(map(repr, wanted))}; {fix}")
    return dict(whole.get("vision_config", whole))


def read_patch_size(path: str | Path) -> int:
    """Return the patch side in pixels of the tower in a Hugging Face directory."""
    import transformers

    config = read_config(path)
    model_type = read_config_file(Path(path) / "config.json")["model_type"]
    spec = next(spec for spec in _TOWERS.values() if model_type in spec.model_types)
    return int(getattr(transformers, spec.config)(**config).patch_size)  # published files leave defaults out


def _spec(kind: str) -> _Tower:
    if kind not in _TOWERS:
        raise ConfigError(f"vision={kind!r} is not a vision tower; use one of {', '.join(_TOWERS)}")
    return _TOWERS[kind]


def _from_pretrained(kind: str, model_class: Any, path: Path, dtype: torch.dtype) -> nn.Module:
    """Load a tower whose every weight is the files' own: what transformers passes over or fills in is refused first."""
    import transformers

    file = path / "config.json"
    config = from_config(getattr(transformers, _spec(kind).config), read_config(path, kind), file)
    with torch.device("meta"):
        empty = from_config(model_class, config, file)
    expected = {name: tuple(parameter.shape) for name, parameter in empty.named_parameters()}
    used = account(
        path, stored_tensors(path), expected, prefixes=("vision_model.", "dinov2."), other_parts=_OTHER_PARTS
    )
    try:
        tower = model_class.from_pretrained(
            str(path), dtype=dtype, use_safetensors=True, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # whatever an ill-fitting file provokes in transformers
        raise ConfigError(f"{path}: cannot be loaded ({first_line(error)})") from None
    refuse_non_finite(dict(tower.named_parameters()), used)
    # transformers hands models over in eval mode; a trained tower is set to train by whoever trains it.
    return tower


def _cut(tower: Any, spec: _Tower, layer: int) -> None:
    """Shorten `tower` in place until its `last_hidden_state` is the wanted state and nothing is unused."""
    layers = getattr(tower.encoder, spec.layers)
    if not -len(layers) <= layer <= -1:
        raise ConfigError(
            f"vision_layer={layer}, but the tower has {len(layers)} layers; use -{len(layers)} to -1"
        )
    setattr(tower.encoder, spec.layers, layers[: len(layers) + layer + 1])
    if layer < -1 or not spec.norms_last_hidden_state:
        # CLIP norms the pooled CLS token alone, which nobody reads here.
        setattr(tower, spec.final_norm, nn.Identity())
    if getattr(tower, "use_head", False):
        tower.use_head = False
        del tower.head
    if getattr(tower.embeddings, "mask_token", None) is not None:
        tower.embeddings.mask_token = None  # DINOv2's own pre-training only
