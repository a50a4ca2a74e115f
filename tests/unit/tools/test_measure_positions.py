"""What the table of positions says: differences pair by pair, and which placing lets columns be seen."""

import pytest
import torch

from tools.measure_positions import Arguments, Placing, difference, measure, positions


@pytest.mark.parametrize(("down", "right"), [(0, 1), (1, 0), (0, 3), (2, 0)])
def test_difference_is_the_mean_over_masked_pairs(down, right):
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(3, 16, 5, generator=generator)
    masked = torch.rand(3, 16, generator=generator) < 0.6
    found = []
    for image in range(3):
        for row in range(4 - down):
            for column in range(4 - right):
                a, b = 4 * row + column, 4 * (row + down) + column + right
                if masked[image, a] and masked[image, b]:
                    gap = states[image, a] - states[image, b]
                    found.append(float(gap.norm() / states[image, a].norm()))
    assert difference(states, masked, 4, down, right) == pytest.approx(sum(found) / len(found), rel=1e-5)


def test_positions():
    assert positions(Placing(name="2D", section=(0, 1, 1)), 2).tolist() == [
        [0] * 4,
        [0, 0, 1, 1],
        [0, 1, 0, 1],
    ]
    assert positions(Placing(name="1D", section=None), 2).tolist() == [[0, 1, 2, 3]] * 3


def test_columns_are_seen_as_rows_are_only_where_bands_take_turns():
    found = measure(Arguments(side=8, num_layers=2, num_heads=2, head_dim=32, num_images=16))
    assert len(found) == 5
    for name, (column, _, row, _) in found.items():
        if "contiguous" in name:
            assert column < 0.1 * row, name
        if "interleaved" in name:
            assert 0.25 < column / row < 4, name
