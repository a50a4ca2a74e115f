"""Towers at native resolution: every image keeps its shape, all images of a micro-batch run as one packed
sequence.

    patches [P, C t p p] -> Qwen2-VL, Qwen2.5-VL (window attention inside), 2 x 2 merger -> [n, E]
    patches [P, C p p]   -> AIMv2 (native checkpoints), a token per patch                -> [n, E]

Positions inside the tower come from each image's true grid, and no image sees another. Shapes: P patches of
all images, n visual tokens, E width of a token, t frames and p pixels of a patch side, m patches of a merged
side.
"""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from laver_mcore.config.errors import ConfigError
from laver_mcore.config.towers import tower_named
from laver_mcore.config.towers.spec import TowerSpec
from laver_mcore.device import send
from laver_mcore.model.tower_weights import (
    account,
    first_line,
    from_config,
    refuse_non_finite,
    stored_tensors,
)
from laver_mcore.model.vision_encoders import read_config, transformers_classes

Grids = Sequence[tuple[int, int]]


class NativeEncoder(nn.Module):
    """Base of both: `encode` for images; for none, an empty result with every parameter in the graph."""

    hidden_size: int
    tower: Any

    def forward(self, pixels_PX: torch.Tensor, grids: Grids) -> torch.Tensor:
        """Patches of images with these token grids (rows, columns) -> visual tokens [n, E], row by row."""
        if not grids:
            nothing = torch.cat([parameter.flatten()[:0] for parameter in self.parameters()])
            return nothing.reshape(0, self.hidden_size)
        return self.encode(pixels_PX.to(next(self.parameters()).dtype), grids)

    def encode(self, pixels_PX: torch.Tensor, grids: Grids) -> torch.Tensor:
        """`forward` for at least one image."""
        raise NotImplementedError


class QwenEncoder(NativeEncoder):
    """The vision tower of Qwen2-VL or Qwen2.5-VL with its merger (arXiv 2409.12191, 2502.13923)."""

    def __init__(self, tower: Any) -> None:
        super().__init__()
        self.tower = tower
        self.merge_size: int = tower.spatial_merge_size
        self.hidden_size = getattr(tower.config, "out_hidden_size", None) or tower.config.hidden_size

    def encode(self, pixels_PX: torch.Tensor, grids: Grids) -> torch.Tensor:
        from transformers import vision_utils

        merge, device = self.merge_size, pixels_PX.device
        grid_thw = torch.tensor([(1, rows * merge, columns * merge) for rows, columns in grids])
        # On the host, where the tower reads sizes and bounds in every layer: from a GPU that would wait each time.
        found = {"position_ids": send(vision_utils.get_vision_position_ids(grid_thw, merge), device)}
        if window := getattr(self.tower, "window_size", None):
            index, bounds = vision_utils.get_vision_window_index(
                grid_thw, merge, window, self.tower.patch_size
            )
            found |= {"window_index": send(index, device), "cu_window_seqlens": bounds}
        return self.tower(pixels_PX, grid_thw=grid_thw, **found).pooler_output


class Aimv2Encoder(NativeEncoder):
    """AIMv2 with sinusoidal positions (arXiv 2411.14402), its own modules run on a packed sequence.

    transformers' forward takes images of one size; the parts are the same, with the positions of each grid
    and attention within each image.
    """

    def __init__(self, tower: Any) -> None:
        super().__init__()
        if not tower.config.is_native:
            raise ConfigError("this AIMv2 tower has positions for one size only; use a native checkpoint")
        self.hidden_size = tower.config.hidden_size
        if tower.use_head:
            tower.use_head = False
            del tower.head
        self.tower = tower

    def encode(self, pixels_PX: torch.Tensor, grids: Grids) -> torch.Tensor:
        embeddings = self.tower.embeddings
        kernel = embeddings.patch_embed
        hidden_PE = F.linear(pixels_PX, kernel.weight.flatten(1), kernel.bias)
        hidden_PE = embeddings.rms_norm(hidden_PE)
        positions = [_sinusoids(grid, self.hidden_size, hidden_PE.device) for grid in grids]
        hidden_PE = hidden_PE + torch.cat(positions).to(hidden_PE.dtype)
        bounds = [0, *itertools.accumulate(rows * columns for rows, columns in grids)]
        outputs = []
        # Image by image: a dense mask over all of them would cost the square of the whole.
        for start, stop in itertools.pairwise(bounds):
            outputs.append(self.tower.encoder(inputs_embeds=hidden_PE[None, start:stop]).last_hidden_state[0])
        return self.tower.rms_norm(torch.cat(outputs))


def _sinusoids(grid: tuple[int, int], width: int, device: torch.device) -> torch.Tensor:
    """AIMv2's fixed positions [rows * columns, width]: sin and cos of the column, then of the row."""
    kind: dict[str, Any] = dict(dtype=torch.float64, device=device)
    frequency = 1.0 / 10000.0 ** (torch.arange(width // 4, **kind) / (width // 4))
    rows, columns = torch.meshgrid(*(torch.arange(n, **kind) for n in grid), indexing="ij")
    column, row = columns.flatten()[:, None] * frequency, rows.flatten()[:, None] * frequency
    return torch.cat([column.sin(), column.cos(), row.sin(), row.cos()], dim=1).float()


ENCODERS: dict[str, type[NativeEncoder]] = {"qwen": QwenEncoder, "aimv2": Aimv2Encoder}
"""`TowerSpec.native` -> how such a tower runs on a packed sequence."""


def build_native_encoder(
    kind: str,
    *,
    path: str | Path,
    random_init: bool = False,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> NativeEncoder:
    """Build a tower from a Hugging Face directory; ValueError if directory and kind disagree."""
    tower_spec = tower_named(kind)
    model_class, settings_class = transformers_classes(tower_spec)
    file = Path(path) / "config.json"
    settings = from_config(settings_class, read_config(path, kind), file)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        meta = torch.device(device).type == "meta"
        with torch.device("meta" if meta else "cpu"):
            tower = from_config(model_class, settings, file).to(dtype)
    encoder: NativeEncoder = ENCODERS[str(tower_spec.native)](tower)
    if not random_init and not meta:
        _load_weights(encoder, Path(path), tower_spec)
    return encoder.to(device)


def _load_weights(encoder: NativeEncoder, path: Path, spec: TowerSpec) -> None:
    """Fill the tower from the directory's safetensors, whole checkpoint or tower alone."""
    from safetensors import SafetensorError, safe_open

    wanted = dict(encoder.tower.named_parameters())
    shapes = {name: tuple(parameter.shape) for name, parameter in wanted.items()}
    prefixes = ("model.", spec.weights_below)
    used = account(path, stored_tensors(path), shapes, prefixes=prefixes, other_parts=spec.other_parts)
    for name, stored in used.items():
        try:
            with safe_open(stored.file, framework="pt") as opened, torch.no_grad():
                wanted[name].copy_(opened.get_tensor(stored.name))
        except (SafetensorError, OSError, RuntimeError) as error:
            raise ConfigError(f"{stored.file}: cannot be loaded ({first_line(error)})") from None
    refuse_non_finite(wanted, used)
