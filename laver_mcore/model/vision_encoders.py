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

from importlib import import_module
from pathlib import Path
from typing import Any, Literal, TypedDict

import torch
from torch import nn

from laver_mcore.config.errors import ConfigError
from laver_mcore.config.hugging_face import read_config_json
from laver_mcore.config.towers import known_towers, tower_named, towers_of_type
from laver_mcore.config.towers.spec import TowerSpec
from laver_mcore.model.tower_weights import (
    account,
    first_line,
    from_config,
    refuse_non_finite,
    stored_tensors,
)

Select = Literal["patch", "cls_patch"]


class VisionEncoder(nn.Module):
    """A transformers vision tower cut at one layer: pixels [I, 3, H, W] -> tokens [I, N, E].

    `grid` is (rows, columns) of patch tokens at the configured image size; a CLS token is dropped or comes
    first. Takes ownership of `tower` and removes what `layer` leaves unused. ValueError if the tower has no
    such layer, or no CLS token where one is selected.
    """

    def __init__(self, kind: str, tower: nn.Module, *, layer: int = -1, select: Select = "patch") -> None:
        super().__init__()
        spec = _fixed(kind)
        if select not in ("patch", "cls_patch"):
            raise ConfigError(f"vision_select={select!r}; use 'patch' or 'cls_patch'")
        if select == "cls_patch" and not spec.has_cls:
            raise ConfigError(f"vision_select='cls_patch', but {kind} has no CLS token; use 'patch'")
        config: Any = tower.config
        self.kind, self.any_size = kind, spec.any_size
        self.hidden_size: int = config.hidden_size
        self.patch_size: int = config.patch_size
        self.image_size: int = config.image_size
        self.grid = self._grid_of(self.image_size, self.image_size)
        self.num_prefix_tokens = spec.prefix_tokens(spec.filled(config.to_dict()))
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
        if not self.any_size and (height, width) != (self.image_size, self.image_size):
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
        patches_INE = tokens_INE[:, self.num_prefix_tokens :]
        return torch.cat([tokens_INE[:, :1], patches_INE], dim=1) if self.keeps_cls else patches_INE

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
    spec = _fixed(kind)
    device = torch.device(device if device is not None else "cpu")
    model_class, settings_class = transformers_classes(spec)
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
        tower_config = from_config(settings_class, config, where)
        with torch.random.fork_rng(devices=[]), torch.device("meta" if device.type == "meta" else "cpu"):
            torch.manual_seed(seed)
            tower = from_config(model_class, tower_config, where).to(dtype)
    return VisionEncoder(kind, tower, layer=layer, select=select).to(device)


def read_config(path: str | Path, kind: str | None = None) -> dict[str, Any]:
    """The tower's settings in `path/config.json`, whole checkpoint or vision half.

    `ConfigError` if it describes a model that `kind` does not name (None: no tower at fixed resolution).
    """
    whole = read_config_json(path, "a Hugging Face directory for vision_path")
    found = whole.get("model_type")
    fixed = [tower for tower in known_towers().values() if tower.native is None]
    towers = fixed if kind is None else [tower_named(kind)]
    wanted = [name for tower in towers for name in tower.model_types]
    if found not in wanted:
        others = towers_of_type(found)
        supported = ", ".join(tower.name for tower in fixed)
        fix = (
            f"set vision to {others[0].name!r}"
            if others
            else f"supported are {supported} at fixed resolution"
        )
        raise ConfigError(
            f"{Path(path) / 'config.json'}: model_type={found!r}, wanted {' or '.join(map(repr, wanted))}; {fix}"
        )
    settings = whole.get("vision_config", whole)
    if not isinstance(settings, dict):
        raise ConfigError(
            f"{Path(path) / 'config.json'}: vision_config={settings!r} is no mapping of settings"
        )
    return dict(settings)


def read_patch_size(path: str | Path) -> int:
    """Return the patch side in pixels of the tower in a Hugging Face directory."""
    return read_sizes(path)["patch_size"]


class Sizes(TypedDict):
    """Sides in pixels of a tower's patches, and of its images where it takes no others."""

    patch_size: int
    image_size: int | None


def read_sizes(path: str | Path) -> Sizes:
    """The sizes of the tower in a Hugging Face directory; ConfigError where they are no numbers of pixels."""
    settings, file = read_config(path), Path(path) / "config.json"
    (tower, *_) = towers_of_type(read_config_json(path)["model_type"])
    filled = from_config(transformers_classes(tower)[1], settings, file)  # published files leave defaults out
    for name in ("patch_size", "image_size"):
        if type(getattr(filled, name)) is not int or getattr(filled, name) < 1:
            raise ConfigError(f"{file}: {name}={getattr(filled, name)!r} is no number of pixels")
    return {"patch_size": filled.patch_size, "image_size": None if tower.any_size else filled.image_size}


def transformers_classes(tower: TowerSpec) -> tuple[Any, Any]:
    """(model, configuration) of transformers."""
    package = f"transformers.models.{tower.package}"
    model = import_module(f"{package}.modeling_{tower.package}")
    return getattr(model, tower.model), getattr(
        import_module(f"{package}.configuration_{tower.package}"), tower.settings
    )


def _fixed(kind: str) -> TowerSpec:
    tower = tower_named(kind)
    if tower.native is not None:
        raise ConfigError(f"vision={kind!r} is a tower at native resolution")
    return tower


def _from_pretrained(kind: str, model_class: Any, path: Path, dtype: torch.dtype) -> nn.Module:
    """Load a tower whose every weight is the files' own: what transformers passes over or fills in is refused first."""
    spec, file = tower_named(kind), path / "config.json"
    config = from_config(transformers_classes(spec)[1], read_config(path, kind), file)
    with torch.device("meta"):
        empty = from_config(model_class, config, file)
    expected = {name: tuple(parameter.shape) for name, parameter in empty.named_parameters()}
    used = account(
        path, stored_tensors(path), expected, prefixes=(spec.weights_below,), other_parts=spec.other_parts
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


def _cut(tower: Any, spec: TowerSpec, layer: int) -> None:
    """Shorten `tower` in place until its `last_hidden_state` is the wanted state and nothing is unused."""
    layers = getattr(tower.encoder, spec.layers)
    if not -len(layers) <= layer <= -1:
        raise ConfigError(
            f"vision_layer={layer}, but the tower has {len(layers)} layers; use -{len(layers)} to -1"
        )
    setattr(tower.encoder, spec.layers, layers[: len(layers) + layer + 1])
    if layer < -1 or not spec.norms_last_state:
        # CLIP norms the pooled CLS token alone, which nobody reads here.
        setattr(tower, spec.final_norm, nn.Identity())
    if getattr(tower, "use_head", False):
        tower.use_head = False
        del tower.head
    if getattr(tower.embeddings, "mask_token", None) is not None:
        tower.embeddings.mask_token = None  # DINOv2's own pre-training only
