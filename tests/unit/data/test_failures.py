"""Images that fail during a run: the sample is silenced, the run goes on, the same on every rank."""

import json

import pytest
import torch
from corpora import encode, picture, write_llava

from laver_mcore.data.errors import DataError
from laver_mcore.data.images import PatchImageProcessor
from laver_mcore.data.loader import DialogueData
from laver_mcore.data.prompt import IGNORE

PROCESSOR = PatchImageProcessor(image_size=16, patch_size=8)
SIZES = {"global_batch_size": 4, "micro_batch_size": 2}
NUM, BAD = 60, (3, 21, 40)  # 5 %


@pytest.fixture(scope="module")
def damaged(tmp_path_factory):
    """60 samples with an image; three files are cut off behind their header, so only decoding finds out."""
    folder = tmp_path_factory.mktemp("damaged")
    pictures = {f"{n}.jpg": encode(picture(seed=n)) for n in range(NUM)}
    for number in BAD:
        pictures[f"{number}.jpg"] = pictures[f"{number}.jpg"][:700]
    return write_llava(folder, pictures)


def build(path, tokenizer, **changes):
    settings = {"image_processor": PROCESSOR, "seq_length": 200, "seed": 5, "tokenizer": tokenizer}
    return DialogueData(path, **settings | changes)


@pytest.mark.parametrize("backend", ["pillow", "torch_uint8"])
def test_every_damaged_sample_is_listed_and_silent(backend, damaged, hugging_face, tmp_path):
    data = build(damaged, hugging_face, quarantine=tmp_path / "quarantine.jsonl", image_backend=backend)
    clean = build(damaged, hugging_face)
    steps = data.rows_per_epoch(0) // 4
    num_images = num_samples = 0
    for step in range(steps):
        wanted = clean.step_batches(step, **SIZES)  # decodes nothing, so finds nothing
        for batch, whole in zip(data.step_batches(step, **SIZES, image_share=(0, 1)), wanted, strict=True):
            assert batch.document_lengths == whole.document_lengths
            assert torch.equal(batch.tokens_T, whole.tokens_T)
            lost = set(whole.image_keys) - set(batch.image_keys)
            assert {key for key, _ in lost} <= {f"s{number}" for number in BAD}
            assert len(batch.pixels) == len(batch.visual_rows_N) == 4 * batch.num_images
            assert (batch.labels_T != IGNORE).sum() == len(batch.supervised_rows_M)
            num_lost_labels = len(whole.supervised_rows_M) - len(batch.supervised_rows_M)
            assert (num_lost_labels > 0) == bool(lost)
            batch.layout.intervals.validate()
            num_images += batch.num_images
            num_samples += batch.num_samples
    rows = [json.loads(line) for line in (tmp_path / "quarantine.jsonl").read_text().splitlines()]
    assert {row["sample"] for row in rows} <= {f"s{number}" for number in BAD}
    assert len(rows) >= 2
    assert all("cannot be decoded" in row["reason"] for row in rows)
    assert num_samples - num_images >= len(rows)


def test_ranks_that_see_different_images_end_up_with_the_same_batches(damaged, hugging_face):
    """Two tensor-parallel ranks, each decoding half the images, exchanging what failed as the loop does."""
    data = [build(damaged, hugging_face) for _ in range(2)]
    steps = 6
    alone = list(build(damaged, hugging_face).iterate(0, steps, **SIZES, image_share=(0, 1)))
    answers = exchange(data, steps)
    assert any(
        keys(a) != keys(b) for a, b in zip(alone, clean_steps(damaged, hugging_face, steps), strict=True)
    )
    for expected, first, second in zip(alone, *answers, strict=True):
        for whole, a, b in zip(expected, first, second, strict=True):
            assert whole.image_keys == a.image_keys == b.image_keys
            assert torch.equal(whole.labels_T, a.labels_T)
            assert torch.equal(whole.labels_T, b.labels_T)
            assert torch.equal(torch.cat([a.pixels, b.pixels]), whole.pixels)


def keys(batches):
    return [batch.image_keys for batch in batches]


def clean_steps(damaged, tokenizer, steps):
    data = build(damaged, tokenizer)
    return [data.step_batches(step, **SIZES) for step in range(steps)]


def exchange(ranks, steps):
    """Run `iterate` on every rank in a thread of its own, with a barrier in place of the all-gather."""
    import threading

    barrier, said, answers = threading.Barrier(len(ranks)), [frozenset()] * len(ranks), [[] for _ in ranks]

    def run(rank):
        def agree(silenced):
            said[rank] = silenced
            barrier.wait(30)
            union, settled = frozenset().union(*said), len(set(said)) == 1
            barrier.wait(30)
            return union, settled

        answers[rank] = list(
            ranks[rank].iterate(0, steps, agree=agree, **SIZES, image_share=(rank, len(ranks)))
        )

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(len(ranks))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return answers


def test_too_many_failures_stop_the_run(tmp_path, hugging_face):
    path = write_llava(tmp_path, {f"{n}.jpg": encode(picture(seed=n))[:700] for n in range(40)})
    steps = build(path, hugging_face).iterate(0, 20, **SIZES, image_share=(0, 1))
    message = r"cannot be decoded .*samples are bad, more than max_bad_fraction=0\.1"
    with pytest.raises(DataError, match=message):
        list(steps)
