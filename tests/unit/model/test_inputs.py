"""Positions and masks of a pass, as the recipe wants them, against what they are row by row."""

from types import SimpleNamespace

import pytest
import torch

from laver_kernels import rope_table
from laver_mcore.data.sequence.layout import dialogue_layout
from laver_mcore.model.inputs import AttentionGeometry, model_inputs

DOCUMENTS = [[("text", 3), ("image", 2, 2), ("text", 1)], [("text", 2)], [("image", 1, 3), ("text", 2)]]
LENGTHS = (8, 2, 5)
SHAPE = dict(head_dim=8, rotary_base=100.0, mrope_section=(0, 2, 2))


def inputs_of(**geometry):
    layout = dialogue_layout(DOCUMENTS)
    batch = SimpleNamespace(
        tokens_T=torch.zeros(len(layout), dtype=torch.int64),
        visual_rows_N=torch.tensor([3, 4, 5, 6, 10, 11, 12]),
        layout=layout,
        image_grids=((2, 2), (1, 3)),
        pixels=None,
    )
    kind = AttentionGeometry(**SHAPE, **geometry)
    return model_inputs(batch, 16, geometry=kind, num_shares=1, device=torch.device("cpu"))


def test_one_dimensional_positions_begin_anew_in_every_document():
    positions = torch.cat([torch.arange(length) for length in LENGTHS])
    cos_TF, sin_TF = inputs_of(rope_2d=False).packed.rope
    wanted = rope_table(positions.expand(3, -1), *SHAPE.values())
    assert torch.equal(cos_TF[:15], wanted[0])
    assert torch.equal(sin_TF[:15], wanted[1])


@pytest.mark.parametrize("mixed", [True, False])
def test_every_row_sees_its_document_and_its_image(mixed):
    found = inputs_of(mixed=mixed).packed.intervals
    starts, images = [0] * 8 + [8] * 2 + [10] * 5, {3: 7, 4: 7, 5: 7, 6: 7, 10: 13, 11: 13, 12: 13}
    stops = [images.get(row, row + 1) if mixed else row + 1 for row in range(15)]
    assert found.row_lo_T[:15].tolist() == starts
    assert found.row_hi_T[:15].tolist() == stops
    assert found.row_hi_T[15] <= found.row_lo_T[15]  # padding sees nothing
