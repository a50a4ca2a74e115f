"""Frozen vision foundation models that give targets, through transformers' own classes.

    dinov2            patch tokens after the final norm             DINOv2 (arXiv 2304.07193)
    clip, siglip      patch tokens of the state that LLaVA reads
    sam               the neck's output, 256 wide, 64 x 64          SAM (arXiv 2304.02643)
    depth_anything    the backbone's last patch tokens, normed      Depth Anything V2 (arXiv 2406.09414)
    radio             spatial features, by the directory's own code AM-RADIO (arXiv 2312.06709)

Shapes: I images, n features of one, Z width.
"""

import hashlib
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from laver_mcore.config.errors import ConfigError
from laver_mcore.config.hugging_face import read_config_json
from laver_mcore.config.targets import TOWER_LAYER, TargetEncoder
from laver_mcore.model.tower_weights import (
    account,
    first_line,
    from_config,
    refuse_non_finite,
    stored_tensors,
)
from laver_mcore.model.vision_encoders import build_vision_encoder, read_config

Grid = tuple[int, int]

_PARTS = {
    "sam": ("vision_encoder.", ("prompt_encoder.", "mask_decoder.", "shared_image_embedding.")),
    "depth_anything": ("backbone.", ("neck.", "head.")),
}
"""Where a whole model has the encoder, and what beside it."""
_MODEL_TYPES = {"sam": ("sam", "sam_vision_model"), "depth_anything": ("depth_anything",)}


def target_config(kind: str, path: str | Path) -> dict[str, Any]:
    """The part of a directory's config.json that describes the encoder; ConfigError for another model's."""
    if kind in TOWER_LAYER:
        return read_config(path, kind)
    whole = read_config_json(path)
    wanted = _MODEL_TYPES.get(kind)
    if wanted and whole.get("model_type") not in wanted:
        raise ConfigError(
            f"{path}/config.json: model_type={whole.get('model_type')!r}, wanted {' or '.join(map(repr, wanted))}"
        )
    return dict(whole.get({"sam": "vision_config", "depth_anything": "backbone_config"}.get(kind, ""), whole))


def target_width(target: TargetEncoder) -> int:
    """Z by the directory's config, as published where there is no such directory."""
    if target.path is None or not Path(target.path).is_dir():
        return target.width or target.published.width
    found = target_config(target.kind, target.path)
    if target.kind == "radio":
        if target.width is None:
            raise ConfigError(
                "target=radio needs target_width: its config.json does not say how wide features are"
            )
        return target.width
    name, default = ("output_channels", 256) if target.kind == "sam" else ("hidden_size", 768)
    return int(found.get(name, default))


class FrozenEncoder(nn.Module):
    """An encoder in eval mode without gradients: pixels [I, 3, H, W] -> features [I, n, Z]."""

    def __init__(self, kind: str, model: Any) -> None:
        super().__init__()
        self.kind, self.model = kind, model
        self.requires_grad_(requires_grad=False).eval()

    @torch.no_grad()
    def forward(self, pixels_I3HW: torch.Tensor) -> tuple[torch.Tensor, Grid]:
        """Features row by row, and the (rows, columns) of their grid."""
        pixels_I3HW = pixels_I3HW.to(next(self.model.parameters()).dtype)
        if self.kind in TOWER_LAYER:
            return self.model(pixels_I3HW), self.model.grid_of(pixels_I3HW)
        if self.kind == "radio":
            features_InZ = self.model(pixels_I3HW).features
            side = round(features_InZ.shape[1] ** 0.5)
            return features_InZ, (side, side)
        if self.kind == "sam":
            maps_IZhw = self.model(pixels_I3HW).last_hidden_state
        else:
            maps_IZhw = self.model(pixels_I3HW).feature_maps[-1]
        return maps_IZhw.flatten(2).transpose(1, 2), tuple(maps_IZhw.shape[-2:])

    def digest(self) -> str:
        """Hex digest of the weights, in any order of their names."""
        return hashlib.blake2b(
            b"".join(sorted(_hashes(self.state_dict().values()))), digest_size=16
        ).hexdigest()


def build_frozen_encoder(
    target: TargetEncoder, *, seed: int = 0, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> FrozenEncoder:
    """The encoder of a directory, every weight compared with the directory's files; ConfigError where one differs.

    The released code of VIRAL most likely trains against an encoder whose matrices were drawn anew on loading.
    """
    if target.path is None:
        raise ConfigError("a frozen encoder needs target_path, its Hugging Face directory")
    path = Path(target.path)
    if target.kind in TOWER_LAYER:
        model: nn.Module = build_vision_encoder(
            target.kind,
            path=path,
            random_init=target.random_init,
            layer=TOWER_LAYER[target.kind],
            seed=seed,
            dtype=dtype,
        )
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = _load(target, path).to(dtype)
    if not target.random_init:
        _compare(model, path, dtype)
    return FrozenEncoder(target.kind, model).to(device)


def _load(target: TargetEncoder, path: Path) -> nn.Module:
    import transformers

    if target.kind == "radio":
        return _remote(target, path)
    target_config(target.kind, path)  # refuses another model's directory
    file = path / "config.json"
    config: Any = from_config(
        partial(transformers.AutoConfig.from_pretrained, local_files_only=True, trust_remote_code=False),
        str(path),
        file,
    )
    if target.kind == "depth_anything":
        # Features as maps, without the CLS token.
        config.reshape_hidden_states = config.backbone_config.reshape_hidden_states = True
        name = "DepthAnythingForDepthEstimation"
    else:
        name = "SamVisionModel" if config.model_type == "sam_vision_model" else "SamModel"
    prefix, other_parts = _PARTS[target.kind]
    model_class, part = getattr(transformers, name), prefix.removesuffix(".")
    if target.random_init:
        return getattr(from_config(model_class, config, file), part)
    with torch.device("meta"):
        empty = getattr(from_config(model_class, config, file), part)
    used = account(path, stored_tensors(path), _shapes(empty), prefixes=(prefix,), other_parts=other_parts)
    encoder = getattr(_from_pretrained(model_class, path, config=config), part)
    refuse_non_finite(dict(encoder.named_parameters()), used)
    return encoder


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def _from_pretrained(model_class: Any, path: Path, **settings: Any) -> Any:
    try:
        return model_class.from_pretrained(
            str(path),
            **{"use_safetensors": True, "local_files_only": True, "trust_remote_code": False} | settings,
        )
    except Exception as error:  # whatever an ill-fitting file provokes in transformers
        raise ConfigError(f"{path}: cannot be loaded ({first_line(error)})") from None


def _remote(target: TargetEncoder, path: Path) -> nn.Module:
    import transformers

    if not target.remote_code:
        raise ConfigError(
            f"target=radio runs the Python files in {path}; read them, then allow it: --target-remote-code"
        )
    if target.random_init:
        config = transformers.AutoConfig.from_pretrained(
            str(path), local_files_only=True, trust_remote_code=True
        )
        return transformers.AutoModel.from_config(config, trust_remote_code=True)
    stored = stored_tensors(path)  # looked at before the directory's code is
    # A shape that differs is the account's to refuse, which names the tensor.
    model = _from_pretrained(
        transformers.AutoModel, path, trust_remote_code=True, ignore_mismatched_sizes=True
    )
    buffers = tuple(dict(model.named_buffers()))
    used = account(path, stored, _shapes(model), prefixes=(), other_parts=buffers)
    refuse_non_finite(dict(model.named_parameters()), used)
    return model


def _compare(model: nn.Module, path: Path, dtype: torch.dtype) -> None:
    """Every weight stands in the directory's files, whatever its name there: transformers renames some on loading."""
    from safetensors import safe_open

    stored: set[bytes] = set()
    for file in sorted(path.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - not a dict
                stored.update(_hashes([opened.get_tensor(name).to(dtype)]))
    weights = dict(model.named_parameters())
    missing = [
        name for name, found in zip(weights, _hashes(weights.values()), strict=True) if found not in stored
    ]
    if missing:
        raise ConfigError(
            f"{path}: {len(missing)} of {len(weights)} weights of the frozen encoder are not those of the files, "
            f"{missing[0]!r} among them"
        )


def _hashes(tensors: Iterable[torch.Tensor]) -> list[bytes]:
    """A digest of each tensor's shape (without sides of 1) and numbers."""
    found = []
    for tensor in tensors:
        digest = hashlib.blake2b(repr([side for side in tensor.shape if side != 1]).encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        found.append(digest.digest())
    return found
