"""Which samples are kept, and the numbers known of them, against encoding every one."""

import numpy as np
import pytest

from laver_mcore.data.images.processors import PatchImageProcessor
from laver_mcore.data.records.conversation import load_records
from laver_mcore.data.sequence.prompt import DEFAULT_SYSTEM_PROMPT, encode_sample
from laver_mcore.data.serve.loader import DialogueData

PROCESSOR = PatchImageProcessor(image_size=16, patch_size=8)  # 2 x 2 tokens an image


@pytest.fixture(scope="module")
def encoded(dataset, hugging_face):
    """(key, tokens, images) of every sample, measured one by one."""
    samples = load_records(dataset / "train.json", dataset)
    return [
        (s.key, len(encode_sample(s.turns, [(2, 2)] * len(s.images), hugging_face)), len(s.images))
        for s in samples
    ]


def build(dataset, tokenizer, seq_length):
    settings = {"tokenizer": tokenizer, "image_processor": PROCESSOR, "seed": 1, "overlong": "drop"}
    return DialogueData(dataset / "train.json", seq_length=seq_length, **settings)


@pytest.mark.parametrize("below", [0, 1], ids=["as long as a row", "one token longer"])
@pytest.mark.parametrize("quantile", [0.3, 0.5, 0.8, 1.0])
def test_dialogues_that_fit_are_kept_and_found_again(quantile, below, encoded, dataset, hugging_face):
    """A row of exactly some dialogue's length, and of one token less."""
    lengths = sorted(length for _, length, _ in encoded)
    seq_length = lengths[int(quantile * (len(lengths) - 1))] - below
    kept = [row for row in encoded if row[1] <= seq_length]
    data = build(dataset, hugging_face, seq_length)
    assert data.num_dropped == len(encoded) - len(kept)
    assert [data.samples.key(number) for number in range(len(data.samples))] == [key for key, _, _ in kept]
    assert data.lengths.tolist() == [length for _, length, _ in kept]
    assert data.samples.visual.tolist() == [4 * num for _, _, num in kept]
    assert data.samples.visual_squares.tolist() == [16 * num for _, _, num in kept]
    for number in (0, len(kept) // 2, len(kept) - 1):
        read = data.samples.read(number)
        assert (read.key, len(read.encoded), len(read.images)) == kept[number]


def test_rows_hold_every_dialogue_that_fits(encoded, dataset, hugging_face):
    seq_length = int(np.median([length for _, length, _ in encoded]))
    data = build(dataset, hugging_face, seq_length)
    rows = [data.row(row) for row in range(data.rows_per_epoch(0))]
    found = sorted(data.samples.key(number) for row in rows for number in row)
    assert found == sorted(key for key, length, _ in encoded if length <= seq_length)


def test_the_default_system_prompt_is_part_of_the_length(encoded, dataset, hugging_face):
    """`<|im_start|>system\\n...<|im_end|>\\n`: two special tokens, and the text between and behind them."""
    block = 2 + len(hugging_face.encode(f"system\n{DEFAULT_SYSTEM_PROMPT}")) + len(hugging_face.encode("\n"))
    without = DialogueData(
        dataset / "train.json",
        tokenizer=hugging_face,
        image_processor=PROCESSOR,
        seq_length=1024,
        seed=1,
        system_prompt="",
    )
    assert without.lengths.tolist() == [length - block for _, length, _ in encoded]
