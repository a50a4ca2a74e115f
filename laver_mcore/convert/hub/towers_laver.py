"""Vision towers of transformers as LaVer uses them: pixels -> features of all visual tokens, row by row.

Shapes: I images, N visual tokens, E width of the tower, P patches.
"""

from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .configuration_laver import LaverConfig


class FixedTower(nn.Module):
    """A tower cut behind one of its layers: pixels [I, 3, H, W] -> [N, E], without CLS token."""

    rows_per_token = 0  # one row of pixels per image

    def __init__(self, config: LaverConfig) -> None:
        super().__init__()
        spec = config.tower
        self.num_prefix_tokens: int = spec["prefix_tokens"]
        tower = tower_of(config)
        self.hidden_size = tower.config.hidden_size
        kept = getattr(tower.encoder, spec["layers"])
        setattr(tower.encoder, spec["layers"], kept[: len(kept) + config.vision_layer + 1])
        if config.vision_layer < -1 or not spec["norms_last_state"]:
            setattr(tower, spec["final_norm"], nn.Identity())
        if getattr(tower, "use_head", False):
            tower.use_head = False
            del tower.head
        if getattr(tower.embeddings, "mask_token", None) is not None:
            tower.embeddings.mask_token = None
        self.tower = tower

    def forward(self, pixel_values: torch.Tensor, image_grids: torch.Tensor) -> torch.Tensor:
        dtype = next(self.parameters()).dtype
        hidden = self.tower(pixel_values=pixel_values.to(dtype)).last_hidden_state
        return hidden[:, self.num_prefix_tokens :].flatten(0, 1)


class QwenTower(nn.Module):
    """Qwen2-VL's or Qwen2.5-VL's tower with its merger: patches [P, C t p p] -> [N, E]."""

    tower: Any

    def __init__(self, tower: Any) -> None:
        super().__init__()
        self.tower = tower
        self.merge_size: int = tower.spatial_merge_size
        self.rows_per_token = self.merge_size**2
        self.hidden_size = getattr(tower.config, "out_hidden_size", None) or tower.config.hidden_size

    def forward(self, pixel_values: torch.Tensor, image_grids: torch.Tensor) -> torch.Tensor:
        grid_thw = F.pad(image_grids * self.merge_size, (1, 0), value=1)
        dtype = next(self.parameters()).dtype
        return self.tower(pixel_values.to(dtype), grid_thw=grid_thw).pooler_output


class Aimv2Tower(nn.Module):
    """AIMv2 with the positions of each image's grid and attention within it: patches [P, C p p] -> [N, E]."""

    rows_per_token = 1
    tower: Any

    def __init__(self, tower: Any) -> None:
        super().__init__()
        self.hidden_size = tower.config.hidden_size
        if tower.use_head:
            tower.use_head = False
            del tower.head
        self.tower = tower

    def forward(self, pixel_values: torch.Tensor, image_grids: torch.Tensor) -> torch.Tensor:
        kernel, grids = self.tower.embeddings.patch_embed, image_grids.tolist()
        hidden = F.linear(pixel_values.to(kernel.weight.dtype), kernel.weight.flatten(1), kernel.bias)
        hidden = self.tower.embeddings.rms_norm(hidden)
        hidden = hidden + torch.cat(
            [sinusoids(rows, columns, self.hidden_size) for rows, columns in grids]
        ).to(hidden)
        images = hidden.split([rows * columns for rows, columns in grids])
        outputs = [self.tower.encoder(inputs_embeds=image[None]).last_hidden_state[0] for image in images]
        return self.tower.rms_norm(torch.cat(outputs))


def sinusoids(rows: int, columns: int, width: int) -> torch.Tensor:
    """AIMv2's fixed positions [rows * columns, width]: sin and cos of the column, then of the row."""
    frequency = 1.0 / 10000.0 ** (torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    row, column = torch.meshgrid(
        torch.arange(rows, dtype=torch.float64), torch.arange(columns, dtype=torch.float64), indexing="ij"
    )
    across, down = column.flatten()[:, None] * frequency, row.flatten()[:, None] * frequency
    return torch.cat([across.sin(), across.cos(), down.sin(), down.cos()], dim=1).float()


def tower_of(config: LaverConfig) -> Any:
    """The tower of transformers that `config.tower` names, whole, at random."""
    package = config.tower["package"]
    path = f"transformers.models.{package}"
    settings = getattr(import_module(f"{path}.configuration_{package}"), config.tower["settings"])
    model = getattr(import_module(f"{path}.modeling_{package}"), config.tower["model"])
    return model(settings(**(config.vision_config or {})))


def build_tower(config: LaverConfig) -> Any:
    """The same as LaVer uses it."""
    native = config.tower["native"]
    if native is None:
        return FixedTower(config)
    return Aimv2Tower(tower_of(config)) if native == "aimv2" else QwenTower(tower_of(config))
