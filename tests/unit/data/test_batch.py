"""One micro-batch of two dialogues, every field written out by hand."""

import numpy as np
import pytest
import torch

from laver_mcore.data.sequence.batch import collate
from laver_mcore.data.sequence.prompt import EncodedSample, ImageSpan

PAD, IMAGE = 0, 9
NONE = -100
LENGTH = 16

# Text, a 1 x 2 image, text; then a 2 x 2 image between text.
FIRST = EncodedSample(
    token_ids_L=np.array([1, IMAGE, IMAGE, 2, 3], dtype=np.int32),
    labels_L=np.array([NONE, NONE, 2, 3, NONE], dtype=np.int32),
    image_spans=(ImageSpan(1, 1, 2),),
)
SECOND = EncodedSample(
    token_ids_L=np.array([4, 5, IMAGE, IMAGE, IMAGE, IMAGE, 6, 7], dtype=np.int32),
    labels_L=np.array([NONE, NONE, NONE, NONE, NONE, NONE, 7, NONE], dtype=np.int32),
    image_spans=(ImageSpan(2, 2, 2),),
)

# Row i sees columns [lo, hi): text up to itself, an image's token up to the end of its image; padding sees nothing.
SEEN = [(0, 1), (0, 3), (0, 3), (0, 4), (0, 5)]
SEEN += [(5, 6), (5, 7), (5, 11), (5, 11), (5, 11), (5, 11), (5, 12), (5, 13)]
POSITIONS = [
    # (t, row, column); text behind an image goes on at the image's first position + max(height, width).
    *[(0, 0, 0), (1, 1, 1), (1, 1, 2), (3, 3, 3), (4, 4, 4)],
    *[(0, 0, 0), (1, 1, 1), (2, 2, 2), (2, 2, 3), (2, 3, 2), (2, 3, 3), (4, 4, 4), (5, 5, 5)],
    *[(0, 0, 0)] * 3,
]


@pytest.fixture(scope="module")
def batch():
    return collate([FIRST, SECOND], ["a", "b"], total_length=LENGTH, pad_id=PAD)


def test_tokens_and_labels(batch):
    assert batch.tokens_T.tolist() == [1, 9, 9, 2, 3, 4, 5, 9, 9, 9, 9, 6, 7, PAD, PAD, PAD]
    assert batch.labels_T.tolist() == [NONE, NONE, 2, 3, *[NONE] * 7, 7, *[NONE] * 4]
    assert batch.supervised_rows_M.tolist() == [2, 3, 11]
    assert batch.visual_rows_N.tolist() == [1, 2, 7, 8, 9, 10]
    assert {tensor.dtype for tensor in batch.tensors().values()} == {torch.int64}


def test_documents_and_images(batch):
    assert batch.document_lengths == (5, 8)
    assert batch.image_grids == ((1, 2), (2, 2))
    assert batch.image_keys == (("a", 0), ("b", 0))
    assert (batch.num_samples, batch.num_images) == (2, 2)


def test_positions(batch):
    assert batch.layout.positions_3S.T.tolist() == [list(position) for position in POSITIONS]


def test_what_every_row_sees(batch):
    seen = np.zeros((LENGTH, LENGTH), dtype=bool)
    for row, (low, high) in enumerate(SEEN):
        seen[row, low:high] = True
    it, places = batch.layout.intervals, torch.arange(LENGTH)
    by_rows = (it.row_lo_T[:, None] <= places) & (places < it.row_hi_T[:, None])
    by_columns = (it.col_lo_T <= places[:, None]) & (places[:, None] < it.col_hi_T)
    assert np.array_equal(by_rows.numpy(), seen)
    assert np.array_equal(by_columns.numpy(), seen)
    assert it.blocks == (0, 5, 13, 16)


def test_several_images_of_a_sample_are_counted_through():
    both = EncodedSample(
        token_ids_L=np.array([IMAGE, 1, IMAGE, IMAGE], dtype=np.int32),
        labels_L=np.full(4, NONE, dtype=np.int32),
        image_spans=(ImageSpan(0, 1, 1), ImageSpan(2, 2, 1)),
    )
    batch = collate([FIRST, both, both], ["a", "b", "c"], total_length=13, pad_id=PAD)
    assert batch.image_keys == (("a", 0), ("b", 0), ("b", 1), ("c", 0), ("c", 1))
    assert batch.image_grids == ((1, 2), (1, 1), (2, 1), (1, 1), (2, 1))
    assert batch.visual_rows_N.tolist() == [1, 2, 5, 7, 8, 9, 11, 12]


@pytest.mark.parametrize("length", [13, 15])
def test_trimmed(length, batch):
    trimmed = batch.trimmed(length)
    assert trimmed.tokens_T.tolist() == batch.tokens_T.tolist()[:length]
    assert trimmed.labels_T.tolist() == batch.labels_T.tolist()[:length]
    assert trimmed.layout.positions_3S.T.tolist() == [list(position) for position in POSITIONS[:length]]
    assert trimmed.layout.intervals.blocks == ((0, 5, 13, 15) if length == 15 else (0, 5, 13))
