"""How well two masked tokens can be told apart by their position alone, for every way to place visual tokens.

    python tools/measure_positions.py

Masked tokens are identical but for their position. This gives random images to random decoder layers, masks some of
the tokens and prints the relative difference |a - b| / |a| of the final states of two masked tokens that stand one step
or a whole side apart, along columns and along rows, averaged over all such pairs.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
import tyro

from laver_kernels import rope_table
from laver_kernels.mixed_attention.rope import Split, rotate


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Sizes of the images and of the random decoder."""

    side: int = 27
    """Visual tokens along each side of an image."""
    num_layers: int = 4
    """Decoder layers, with random weights of standard deviation 1 / sqrt(width)."""
    num_heads: int = 4
    head_dim: int = 128
    rotary_base: float = 1e6
    masked: float = 0.25
    """Share of masked tokens."""
    num_images: int = 8
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Placing:
    """One way to place the tokens of an image; no section: one position after the other."""

    name: str
    section: tuple[int, int, int] | None
    split: Split = "contiguous"


def placings(half: int) -> list[Placing]:
    """1D, the pure 2D split, and the one in which t has a quarter of the bands, each cut and interleaved."""
    quarter, rest = half // 4, half - half // 4
    sections = [(0, half - half // 2, half // 2), (quarter, rest - rest // 2, rest // 2)]
    splits: tuple[Split, ...] = ("contiguous", "interleaved")
    found = [Placing(name="1D", section=None)]
    return found + [
        Placing(name=f"{list(section)} {split}", section=section, split=split)
        for section in sections
        for split in splits
    ]


def positions(placing: Placing, side: int) -> torch.Tensor:
    """(t, row, column) of every token of a square image, [3, N]."""
    place_N = torch.arange(side * side)
    if placing.section is None:
        return place_N.expand(3, -1)
    return torch.stack([torch.zeros_like(place_N), place_N // side, place_N % side])


def final_states(x_BND: torch.Tensor, placing: Placing, arguments: Arguments) -> torch.Tensor:
    """Pre-norm layers of attention in both directions and a GELU MLP, [B, N, D] -> [B, N, D]."""
    generator = torch.Generator().manual_seed(arguments.seed + 1)
    batch, tokens, width = x_BND.shape
    table = rope_table(
        positions(placing, arguments.side),
        arguments.head_dim,
        arguments.rotary_base,
        placing.section,
        split=placing.split,
    )

    def weight(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, columns, generator=generator) / columns**0.5

    def heads(rows_BND: torch.Tensor, turn: bool) -> torch.Tensor:
        x = rows_BND.view(batch, tokens, arguments.num_heads, arguments.head_dim)
        if turn:
            x = torch.stack([rotate(image, *table) for image in x])
        return x.transpose(1, 2)

    for _ in range(arguments.num_layers):
        normed = F.rms_norm(x_BND, (width,))
        query, key, value = (
            heads(normed @ weight(width, width).T, turn=turn) for turn in (True, True, False)
        )
        seen = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).reshape(x_BND.shape)
        x_BND = x_BND + seen @ weight(width, width).T
        inner = F.gelu(F.rms_norm(x_BND, (width,)) @ weight(2 * width, width).T)
        x_BND = x_BND + inner @ weight(width, 2 * width).T
    return x_BND


def difference(states_BND: torch.Tensor, masked_BN: torch.Tensor, side: int, down: int, right: int) -> float:
    """Mean |a - b| / |a| over all pairs of masked tokens, b being `down` rows below and `right` columns beside a."""
    states = states_BND.unflatten(1, (side, side))
    masked = masked_BN.unflatten(1, (side, side))
    rows, columns = side - down, side - right
    first, second = states[:, :rows, :columns], states[:, down:, right:]
    both = masked[:, :rows, :columns] & masked[:, down:, right:]
    return float(((first - second).norm(dim=-1) / first.norm(dim=-1))[both].mean())


def measure(arguments: Arguments) -> dict[str, list[float]]:
    """Placing -> differences of the next column, the farthest column, the next row, the farthest row."""
    generator = torch.Generator().manual_seed(arguments.seed)
    side, width = arguments.side, arguments.num_heads * arguments.head_dim
    tokens_BND = torch.randn(arguments.num_images, side * side, width, generator=generator)
    masked_BN = torch.rand(tokens_BND.shape[:2], generator=generator) < arguments.masked
    tokens_BND[masked_BN] = torch.randn(width, generator=generator)
    steps = ((0, 1), (0, side - 1), (1, 0), (side - 1, 0))
    found = {}
    for placing in placings(arguments.head_dim // 2):
        states_BND = final_states(tokens_BND, placing, arguments)
        found[placing.name] = [difference(states_BND, masked_BN, side, *step) for step in steps]
    return found


def main() -> int:
    """Command line; prints a table in Markdown."""
    arguments = tyro.cli(Arguments, description=__doc__)
    far = arguments.side - 1
    print(f"| bands of (t, row, column) | next column | {far} columns | next row | {far} rows |")
    print("|---|---|---|---|---|")
    for name, values in measure(arguments).items():
        print(f"| {name} | " + " | ".join(f"{value:.2g}" for value in values) + " |")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
