"""Over-long dialogues lose whole turns from their end, against every beginning measured by itself."""

import json
import logging

import pytest
from corpora import encode, picture

from laver_mcore.data.images.processors import PatchImageProcessor
from laver_mcore.data.sequence.prompt import encode_sample
from laver_mcore.data.serve.loader import DialogueData

PROCESSOR = PatchImageProcessor(image_size=32, patch_size=8)  # 4 x 4 tokens an image
# Numbers of images of each question of a dialogue.
DIALOGUES = {
    "text": [0, 0, 0],
    "one image in front": [1, 0, 0],
    "an image a question": [1, 1, 1, 1],
    "images behind": [0, 0, 3],
    "images in front": [3, 0],
    "a single question": [2],
}


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    folder = tmp_path_factory.mktemp("truncate")
    (folder / "a.jpg").write_bytes(encode(picture()))
    records = []
    for key, images in DIALOGUES.items():
        turns = []
        for number, count in enumerate(images):
            turns.append({"from": "human", "value": "<image>\n" * count + f"question {number}"})
            turns.append({"from": "gpt", "value": f"answer {number}"})
        records.append({"id": key, "image": ["a.jpg"] * sum(images), "conversations": turns})
    (folder / "train.json").write_text(json.dumps(records))
    return folder / "train.json"


def build(path, tokenizer, seq_length, overlong="truncate"):
    settings = {"tokenizer": tokenizer, "image_processor": PROCESSOR, "seed": 1, "overlong": overlong}
    return DialogueData(path, seq_length=seq_length, **settings)


def expected(path, tokenizer, seq_length):
    """key -> (turns kept, images kept, tokens), by trying every beginning of an even number of turns."""
    whole = build(path, tokenizer, 4096, "error").samples
    found = {}
    for sample in whole:
        for num_turns in range(2, len(sample.turns) + 1, 2):
            images = sum(DIALOGUES[sample.key][: num_turns // 2])
            length = len(encode_sample(sample.turns[:num_turns], [(4, 4)] * images, tokenizer))
            if length <= seq_length:
                found[sample.key] = (num_turns, images, length)
    return found


@pytest.mark.parametrize("seq_length", [80, 100, 120, 140, 4096])
def test_what_is_kept(seq_length, path, hugging_face, caplog):
    want = expected(path, hugging_face, seq_length)
    with caplog.at_level(logging.WARNING):
        data = build(path, hugging_face, seq_length)
    samples = data.samples
    got = {}
    for number, sample in enumerate(samples):
        read = samples.read(number)
        assert len(read.images) == len(sample.images) == len(read.encoded.image_spans)
        assert (samples.visual[number], samples.visual_squares[number]) == (
            16 * len(sample.images),
            16**2 * len(sample.images),
        )
        assert sample.turns[-1].role == "assistant"
        got[sample.key] = (len(sample.turns), len(sample.images), len(read.encoded))
        assert data.lengths[number] == len(read.encoded) <= seq_length
    assert got == want
    num_cut = sum(turns < 2 * len(DIALOGUES[key]) for key, (turns, _, _) in want.items())
    assert (data.num_cut, data.num_dropped) == (num_cut, len(DIALOGUES) - len(want))
    assert (f"cut {num_cut} of 6 samples" in caplog.text) == (num_cut > 0)


def test_the_choices_differ_where_something_is_cut(path, hugging_face):
    cut, dropped = build(path, hugging_face, 140), build(path, hugging_face, 140, "drop")
    assert cut.num_cut > 0 and len(cut.samples) == len(dropped.samples) + cut.num_cut


def test_batches_of_cut_dialogues(path, hugging_face):
    data = build(path, hugging_face, 140)
    (batch,) = data.step_batches(0, global_batch_size=4, micro_batch_size=4, image_share=(0, 1))
    assert len(batch.image_grids) == len(batch.image_keys) > 0
