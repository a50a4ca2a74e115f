"""Rotary position embedding as one cos/sin table per batch, shared by all layers: 1D, 2D and sections."""

from typing import Literal, get_args

import torch
from torch import Tensor

from laver_kernels.checks import want_tensor

Split = Literal["contiguous", "interleaved"]


def band_axes(section: tuple[int, int, int], split: Split) -> list[int]:
    """The axis (0 t, 1 row, 2 column) that every frequency reads, the fastest first.

    `contiguous`: one axis after the other (Qwen2-VL, arXiv 2409.12191, 2.1), so that columns have the slow half alone.
    `interleaved`: the axes take turns while they have bands left, so that each has fast and slow ones (Qwen3-VL).
    """
    bands = [(turn, axis) for axis, count in enumerate(section) for turn in range(count)]
    return [axis for _, axis in (sorted(bands) if split == "interleaved" else bands)]


def rope_table(
    positions_3T: Tensor,
    head_dim: int,
    base: float = 1e6,
    section: tuple[int, int, int] | None = None,
    device: torch.device | str | None = None,
    scaling: tuple[float, float, float, int] | None = None,
    split: Split = "contiguous",
) -> tuple[Tensor, Tensor]:
    """Tabulates cos and sin, fp32 `[T, head_dim / 2]`, of the angle of every token and frequency.

    `positions_3T` holds (t, row, column) per token. Frequency `f` (angle = position * base^(-2f / head_dim))
    reads the axis in whose band it falls: `section` counts the bands of t, row and column, and `split` deals them out
    (`band_axes`); the default `(0, head_dim/4, head_dim/4)` is the pure 2D split. Where the three positions agree
    (text) this is 1D RoPE, whatever the split.
    `scaling` slows frequencies as Llama 3.1 does: (factor, low, high, original positions), see `scaled`.

    Raises:
        ValueError: odd head dimension, a section that does not sum to head_dim / 2, or an unknown split.
    """
    want_tensor(
        "rope_table", "positions_3T", positions_3T, (3, "T"), (torch.int32, torch.int64, torch.float32)
    )
    num_frequencies = head_dim // 2
    if section is None:
        if head_dim % 4:
            raise ValueError(f"rope_table: head_dim={head_dim} has no equal 2D split, want a multiple of 4")
        section = (0, head_dim // 4, head_dim // 4)
    if head_dim % 2 or len(section) != 3 or min(section) < 0 or sum(section) != num_frequencies:
        raise ValueError(
            f"rope_table: section={section} for head_dim={head_dim}, "
            f"want three counts that sum to {head_dim / 2:g}"
        )
    if split not in get_args(Split):
        raise ValueError(f"rope_table: split={split!r}, want one of {', '.join(get_args(Split))}")
    device = positions_3T.device if device is None else torch.device(device)
    exponent_F = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim
    frequency_F = 1.0 / base**exponent_F
    if scaling is not None:
        frequency_F = scaled(frequency_F, *scaling)
    # Built on the host: repeating by counts on a GPU would wait for it to learn the length.
    axis_F = torch.tensor(band_axes(section, split)).to(device, non_blocking=True)
    position_TF = positions_3T.to(device).float()[axis_F].T
    angle_TF = position_TF * frequency_F
    return angle_TF.cos().contiguous(), angle_TF.sin().contiguous()


def scaled(frequency_F: Tensor, factor: float, low: float, high: float, positions: int) -> Tensor:
    """Rotary frequencies for sequences longer than the `positions` that the model first learned.

    What turns at least `high` times within them stays, what turns less than `low` times is `factor` times slower,
    and between the two the turns decide how much of either. Source: Llama 3.1 (arXiv 2407.21783, 3.4.2).
    """
    turns_F = positions * frequency_F / (2.0 * torch.pi)
    kept_F = ((turns_F - low) / (high - low)).clamp(0.0, 1.0)
    return (1.0 - kept_F) * frequency_F / factor + kept_F * frequency_F


def rotate(x_THD: Tensor, cos_TF: Tensor, sin_TF: Tensor, inverse: bool = False) -> Tensor:
    """Rotates the pairs (x[f], x[f + D/2]) by the table's angles (half-split convention), in fp32 or fp64."""
    wide = torch.promote_types(x_THD.dtype, torch.float32)
    cos, sin = cos_TF.to(wide)[:, None], sin_TF.to(wide)[:, None]
    if inverse:
        sin = -sin
    first, second = x_THD.to(wide).chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x_THD.dtype)
