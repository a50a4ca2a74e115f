"""Qwen2's decoder over embedded rows: RMSNorm, grouped-query attention with biases, SwiGLU, tied or own LM head."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

PREFIX = "language_model.decoder."
LAYER = f"{PREFIX}layers."


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes of a decoder, and how its rotary bands are shared out over (t, row, column)."""

    num_layers: int
    num_heads: int
    num_groups: int
    head_dim: int
    rotary_base: float
    mrope_section: tuple[int, int, int]
    mrope_split: str = "interleaved"
    norm_epsilon: float = 1e-6


def rms_norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    """x / sqrt(mean(x^2) + epsilon) times the weight."""
    return x / (x.square().mean(-1, keepdim=True) + epsilon).sqrt() * weight


def axis_of_band(shape: Shape) -> list[int]:
    """The axis that each rotary band reads: dealt out in turns to those that want more, or one after the other."""
    if shape.mrope_split == "contiguous":
        return [axis for axis, count in enumerate(shape.mrope_section) for _ in range(count)]
    left, axes = list(shape.mrope_section), []
    while any(left):
        for axis in range(3):
            if left[axis]:
                left[axis] -= 1
                axes.append(axis)
    return axes


def rotate(x_SHC: torch.Tensor, positions_S3: torch.Tensor, shape: Shape) -> torch.Tensor:
    """The pair (f, f + C / 2) of every head is turned by position x base^(-2 f / C), its band's axis deciding."""
    half = shape.head_dim // 2
    axes = axis_of_band(shape)
    assert len(axes) == half
    out = x_SHC.clone()
    for f, axis in enumerate(axes):
        angle_S1 = positions_S3[:, axis, None].double() * shape.rotary_base ** (-2.0 * f / shape.head_dim)
        a, b = x_SHC[..., f], x_SHC[..., f + half]
        out[..., f] = a * angle_S1.cos() - b * angle_S1.sin()
        out[..., f + half] = b * angle_S1.cos() + a * angle_S1.sin()
    return out


def attention(
    x_SD: torch.Tensor, weights: dict[str, torch.Tensor], layer: int, positions_S3, mask_SS, shape: Shape
) -> torch.Tensor:
    """Softmax attention, [S, D] -> [S, D].

    The fused weight holds, group by group, the group's query heads, its key head and its value head (Megatron-Core).
    """
    length, per_group, channels = len(x_SD), shape.num_heads // shape.num_groups, shape.head_dim
    fused = x_SD @ weights[f"{LAYER}self_attention.linear_qkv.weight"][layer].T
    fused = fused + weights[f"{LAYER}self_attention.linear_qkv.bias"][layer]
    fused = fused.view(length, shape.num_groups, per_group + 2, channels)
    out = []
    for group in range(shape.num_groups):
        key = rotate(fused[:, group, per_group, None], positions_S3, shape)[:, 0]
        value = fused[:, group, per_group + 1]
        for head in range(per_group):
            query = rotate(fused[:, group, head, None], positions_S3, shape)[:, 0]
            scores = (query @ key.T / channels**0.5).masked_fill(~mask_SS, float("-inf"))
            out.append(scores.softmax(-1) @ value)
    return torch.cat(out, -1) @ weights[f"{LAYER}self_attention.linear_proj.weight"][layer].T


def decode(
    x_SD: torch.Tensor, weights: dict[str, torch.Tensor], positions_S3, mask_SS, shape: Shape
) -> torch.Tensor:
    """Embedded rows [S, D] -> states after the final norm [S, D]."""
    for layer in range(shape.num_layers):
        norm = weights[f"{LAYER}self_attention.linear_qkv.layer_norm_weight"][layer]
        normed = rms_norm(x_SD, norm, shape.norm_epsilon)
        x_SD = x_SD + attention(normed, weights, layer, positions_S3, mask_SS, shape)
        normed = rms_norm(
            x_SD, weights[f"{LAYER}mlp.linear_fc1.layer_norm_weight"][layer], shape.norm_epsilon
        )
        gate, up = (normed @ weights[f"{LAYER}mlp.linear_fc1.weight"][layer].T).chunk(2, -1)
        x_SD = x_SD + (F.silu(gate) * up) @ weights[f"{LAYER}mlp.linear_fc2.weight"][layer].T
    return rms_norm(x_SD, weights[f"{PREFIX}final_layernorm.weight"], shape.norm_epsilon)
