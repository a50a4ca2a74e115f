"""Positions and intervals against the definitions: those of LaVer (arXiv 2512.06281), and transformers' Qwen2-VL."""

import numpy as np
import pytest
import torch

from laver_mcore.data.sequence.layout import concatenate, dialogue_layout, reconstruction_layout, trim


def dense_mask(documents, total_length):
    """allow(i, j) written from the definition, token by token."""
    document, image = [], []
    num_images = 0
    for index, segments in enumerate(documents):
        for segment in segments:
            is_image = segment[0] == "image"
            num_images += is_image
            length = segment[1] * segment[2] if is_image else segment[1]
            document += [index] * length
            image += [num_images if is_image else None] * length
    allow = np.zeros((total_length, total_length), dtype=bool)
    for i in range(len(document)):
        for j in range(len(document)):
            same_image = image[i] is not None and image[i] == image[j]
            allow[i, j] = document[i] == document[j] and (j <= i or same_image)
    return torch.from_numpy(allow)


def mask_from_rows(intervals):
    column = torch.arange(len(intervals))
    return (intervals.row_lo_T[:, None] <= column) & (column < intervals.row_hi_T[:, None])


def mask_from_columns(intervals):
    row = torch.arange(len(intervals))[:, None]
    return (intervals.col_lo_T <= row) & (row < intervals.col_hi_T)


DOCUMENTS = {
    "text only": [[("text", 5)]],
    "text, image, text": [[("text", 2), ("image", 3, 2), ("text", 3)]],
    "two images of one document": [[("text", 2), ("image", 2, 2), ("text", 1), ("image", 1, 3), ("text", 2)]],
    "image first": [[("image", 2, 3), ("text", 2)]],
    "image last": [[("text", 3), ("image", 2, 2)]],
    "adjacent images": [[("text", 1), ("image", 2, 2), ("image", 2, 1), ("text", 1)]],
    "one-token image": [[("text", 2), ("image", 1, 1), ("text", 2)]],
    "image alone": [[("image", 2, 2)]],
    "documents side by side": [
        [("text", 2), ("image", 2, 2), ("text", 1)],
        [("text", 3)],
        [("image", 1, 2), ("text", 1), ("image", 2, 2)],
    ],
    "images meet at a boundary": [[("text", 1), ("image", 2, 2)], [("image", 2, 2), ("text", 1)]],
    "an empty document between": [[("text", 2)], [], [("image", 1, 2)]],
    "an empty segment": [[("text", 0), ("image", 1, 2), ("text", 0), ("text", 2)]],
    "no documents": [],
}


@pytest.mark.parametrize("documents", DOCUMENTS.values(), ids=DOCUMENTS.keys())
@pytest.mark.parametrize("padding", [0, 3])
def test_rows_and_columns_describe_the_dense_mask(documents, padding):
    layout = dialogue_layout(documents)
    total_length = len(layout) + padding
    layout = concatenate([layout], total_length)
    expected = dense_mask(documents, total_length)
    assert torch.equal(mask_from_rows(layout.intervals), expected)
    assert torch.equal(mask_from_columns(layout.intervals), expected)
    layout.intervals.validate()


@pytest.mark.parametrize("documents", DOCUMENTS.values(), ids=DOCUMENTS.keys())
def test_concatenation_equals_one_layout(documents):
    other = [[("text", 2), ("image", 2, 1)], [("text", 1)]]
    parts = concatenate([dialogue_layout(documents), dialogue_layout(other)], 40)
    whole = concatenate([dialogue_layout([*documents, *other])], 40)
    assert torch.equal(parts.positions_3S, whole.positions_3S)
    assert torch.equal(mask_from_rows(parts.intervals), mask_from_rows(whole.intervals))
    assert torch.equal(mask_from_columns(parts.intervals), mask_from_columns(whole.intervals))
    assert parts.intervals.blocks == whole.intervals.blocks


def test_padding_inside_a_concatenation_stays_empty():
    padded = concatenate([dialogue_layout([[("text", 2)]])], 4)
    layout = concatenate([padded, reconstruction_layout([(1, 2)])], 8)
    layout.intervals.validate()
    assert mask_from_rows(layout.intervals).sum(1).tolist() == [1, 2, 0, 0, 2, 2, 0, 0]
    assert layout.intervals.blocks == (0, 2, 4, 6, 8)


def test_a_total_length_that_is_too_short_is_refused():
    with pytest.raises(ValueError, match="5 tokens do not fit into total_length=4"):
        concatenate([dialogue_layout([[("text", 5)]])], 4)


def test_published_example_of_positions():
    """Text, a 4 x 3 grid, text."""
    positions = dialogue_layout([[("text", 3), ("image", 4, 3), ("text", 2)]]).positions_3S.tolist()
    assert positions == [
        [0, 1, 2, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 7, 8],
        [0, 1, 2, 3, 3, 3, 4, 4, 4, 5, 5, 5, 6, 6, 6, 7, 8],
        [0, 1, 2, 3, 4, 5, 3, 4, 5, 3, 4, 5, 3, 4, 5, 7, 8],
    ]


def test_reconstruction_positions_start_at_zero_for_every_image():
    layout = reconstruction_layout([(2, 2), (1, 3)])
    assert layout.positions_3S.tolist() == [
        [0, 0, 0, 0, 0, 0, 0],
        [0, 0, 1, 1, 0, 0, 0],
        [0, 1, 0, 1, 0, 1, 2],
    ]
    assert torch.equal(
        mask_from_rows(layout.intervals), torch.block_diag(torch.ones(4, 4), torch.ones(3, 3)).bool()
    )
    assert layout.intervals.blocks == (0, 4, 7)


@pytest.mark.parametrize(
    "document",
    [
        [("text", 3), ("image", 4, 3), ("text", 2)],
        [("text", 1), ("image", 2, 5), ("text", 1), ("image", 1, 1), ("text", 4)],
        [("image", 3, 3), ("text", 2)],
        [("text", 2), ("image", 1, 6)],
    ],
    ids=["published", "two images", "image first", "image last"],
)
def test_positions_equal_transformers_qwen2_vl(document):
    from types import SimpleNamespace

    from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLModel

    kinds = [int(s[0] == "image") for s in document for _ in range(s[1] * s[2] if s[0] == "image" else s[1])]
    grids = torch.tensor([[1, *segment[1:]] for segment in document if segment[0] == "image"])
    config = SimpleNamespace(vision_config=SimpleNamespace(spatial_merge_size=1))
    model = SimpleNamespace(config=config)
    model.get_vision_position_ids = lambda *a, **k: Qwen2VLModel.get_vision_position_ids(model, *a, **k)
    expected, _ = Qwen2VLModel.get_rope_index(
        model, torch.zeros(1, len(kinds), dtype=torch.long), torch.tensor([kinds]), image_grid_thw=grids
    )
    assert torch.equal(dialogue_layout([document]).positions_3S, expected[:, 0])


@pytest.mark.parametrize("padding", [0, 1, 5])
@pytest.mark.parametrize("documents", DOCUMENTS.values(), ids=DOCUMENTS)
def test_trimmed_layout_is_that_of_a_shorter_sequence(documents, padding):
    whole = dialogue_layout(documents)
    length = len(whole) + padding
    trimmed = trim(concatenate([whole], length + 9), length)
    assert len(trimmed) == length
    trimmed.intervals.validate()
    assert trimmed.intervals.blocks[-1] == length
    wanted = dense_mask(documents, length)
    assert torch.equal(mask_from_rows(trimmed.intervals), wanted)
    assert torch.equal(mask_from_columns(trimmed.intervals), wanted)
    assert torch.equal(trimmed.positions_3S, concatenate([whole], length).positions_3S)
