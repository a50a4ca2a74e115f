"""Order, resume, elasticity, image shares, prefetching."""

import itertools
import json
import threading
import time
from collections import Counter

import pytest
import torch

from laver_mcore.data.errors import DataError
from laver_mcore.data.images.processors import PatchImageProcessor
from laver_mcore.data.order.cost import PackingCost
from laver_mcore.data.records.sample import Turn
from laver_mcore.data.sequence.batch import Batch, collate
from laver_mcore.data.sequence.prompt import IGNORE, encode_prompt
from laver_mcore.data.serve.ahead import StepMaker
from laver_mcore.data.serve.loader import DialogueData
from laver_mcore.data.serve.steps import StepPlan

PROCESSOR = PatchImageProcessor(image_size=16, patch_size=8)
COST = PackingCost(text_token=0.1, pair=1e-3, visual_token=1.5, visual_pair=0.1)
SIZES = {"global_batch_size": 8, "micro_batch_size": 2}


def build(dataset, tokenizer, **changes):
    settings = {"image_folder": dataset, "image_processor": PROCESSOR, "seq_length": 256, "seed": 7}
    settings |= {"tokenizer": tokenizer, "packing_window": 16, "cost": COST} | changes
    return DialogueData(settings.pop("source", dataset / "train.json"), **settings)


@pytest.fixture(scope="module")
def data(dataset, hugging_face):
    return build(dataset, hugging_face)


def equal(first: Batch, second: Batch) -> bool:
    tensors = ("tokens_T", "labels_T", "supervised_rows_M", "visual_rows_N", "pixels")
    return (
        all(
            getattr(first, name) is getattr(second, name) is None
            or torch.equal(getattr(first, name), getattr(second, name))
            for name in tensors
        )
        and torch.equal(first.layout.positions_3S, second.layout.positions_3S)
        and torch.equal(first.layout.intervals.row_hi_T, second.layout.intervals.row_hi_T)
        and first.image_keys == second.image_keys
        and first.image_grids == second.image_grids
        and first.document_lengths == second.document_lengths
    )


def test_a_batch_is_consistent(data, hugging_face):
    for step in range(3):
        for batch in data.step_batches(step, **SIZES, image_share=(0, 1)):
            assert batch.tokens_T.shape == batch.labels_T.shape == (2 * 256,)
            assert batch.tokens_T.dtype == batch.labels_T.dtype == torch.int64
            assert len(batch.layout) == 512
            batch.layout.intervals.validate()
            used = sum(batch.document_lengths)
            assert (batch.tokens_T[used:] == hugging_face.special.pad).all()
            assert (batch.labels_T[used:] == IGNORE).all()
            assert torch.equal(batch.supervised_rows_M, (batch.labels_T != IGNORE).nonzero().flatten())
            pads = (batch.tokens_T == hugging_face.special.image_pad).nonzero().flatten()
            assert torch.equal(batch.visual_rows_N, pads)
            assert sum(h * w for h, w in batch.image_grids) == len(pads)
            assert batch.pixels.shape == (len(pads), PROCESSOR.patch_dim)
            assert len(batch.image_keys) == batch.num_images
            rows = batch.supervised_rows_M
            assert torch.equal(batch.labels_T[rows], batch.tokens_T[rows + 1])


def test_an_epoch_visits_every_sample_once_and_each_epoch_differs(data):
    first = 0
    groups = []
    for epoch in range(20):
        rows = [data.row(first + r) for r in range(data.rows_per_epoch(epoch))]
        assert sorted(i for row in rows for i in row) == list(range(40))
        assert all(data.lengths[row].sum() <= 256 for row in rows)
        groups.append({tuple(sorted(row)) for row in rows})
        first += len(rows)
    assert all(a != b for a, b in itertools.pairwise(groups))
    assert len({len(rows) for rows in groups[:-1]}) > 1, "choose data whose epochs differ in length"


def test_batches_hold_the_samples_of_their_rows(data):
    for step in range(12):
        (batch,) = data.step_batches(step, global_batch_size=2, micro_batch_size=2)
        members = [index for row in (2 * step, 2 * step + 1) for index in data.row(row)]
        assert list(batch.document_lengths) == data.lengths[members].tolist()
        keys = [(data.samples[i].key, n) for i in members for n in range(len(data.samples[i].images))]
        assert list(batch.image_keys) == keys


@pytest.mark.parametrize("prefetch_steps", [0, 1, 2, 5])
@pytest.mark.parametrize(("start", "end"), [(0, 7), (3, 7), (6, 7)])
def test_steps_come_in_order_however_far_ahead_they_are_made(start, end, prefetch_steps, data):
    """Step k holds the rows from 2 k on, and the steps end where they should."""
    layout = {"global_batch_size": 2, "micro_batch_size": 2}
    got = [
        batch.document_lengths
        for (batch,) in data.iterate(start, end, prefetch_steps=prefetch_steps, **layout)
    ]
    rows = [[*data.row(2 * step), *data.row(2 * step + 1)] for step in range(start, end)]
    assert got == [tuple(data.lengths[members].tolist()) for members in rows]


def test_rows_do_not_depend_on_what_was_asked_before(data, dataset, hugging_face):
    fresh = build(dataset, hugging_face)
    late = [fresh.row(r) for r in (97, 3, 60, 0)]
    assert late == [data.row(r) for r in (97, 3, 60, 0)]


def test_another_seed_groups_the_samples_otherwise(data, dataset, hugging_face):
    other = build(dataset, hugging_face, seed=8)
    groups = [{tuple(sorted(some.row(r))) for r in range(some.rows_per_epoch(0))} for some in (data, other)]
    assert groups[0] != groups[1]


@pytest.mark.parametrize("start", [0, 1, 4, 7])
def test_resume_from_any_step_equals_the_uninterrupted_run(start, data, dataset, hugging_face):
    whole = list(data.iterate(0, 9, **SIZES, image_share=(0, 1)))
    resumed = list(build(dataset, hugging_face).iterate(start, 9, **SIZES, image_share=(0, 1)))
    assert len(resumed) == 9 - start
    for expected, got in zip(whole[start:], resumed, strict=True):
        assert len(expected) == len(got) == 4
        assert all(equal(a, b) for a, b in zip(expected, got, strict=True))


@pytest.mark.parametrize(
    ("micro_batch_size", "dp_size"), [(1, 1), (1, 8), (2, 2), (4, 2), (8, 1), (2, 4), (1, 2)]
)
def test_a_step_holds_the_same_samples_under_any_layout(micro_batch_size, dp_size, data):
    def step_contents(step, micro_batch_size, dp_size):
        batches = [
            data.step_batches(
                step,
                global_batch_size=8,
                micro_batch_size=micro_batch_size,
                dp_rank=rank,
                dp_size=dp_size,
            )
            for rank in range(dp_size)
        ]
        assert {len(of_rank) for of_rank in batches} == {8 // micro_batch_size // dp_size}
        batches = [batch for of_rank in batches for batch in of_rank]
        documents = [
            tuple(document.tolist())
            for batch in batches
            for document in batch.tokens_T[: sum(batch.document_lengths)].split(list(batch.document_lengths))
        ]
        images = [key for batch in batches for key in batch.image_keys]
        supervised = sum(len(batch.supervised_rows_M) for batch in batches)
        return Counter(documents), Counter(images), supervised

    for step in (0, 3):  # the second straddles two epochs
        assert step_contents(step, micro_batch_size, dp_size) == step_contents(step, 8, 1)


@pytest.fixture(scope="module")
def mixture(dataset, hugging_face):
    return build(
        dataset, hugging_face, source=[dataset / "train.json"] * 2, weights=(0.4, 1.5), image_folder=None
    )


@pytest.mark.parametrize("dp_size", [1, 2, 4])
def test_a_mixture_resumed_in_the_middle_of_an_epoch_under_any_layout(
    dp_size, mixture, dataset, hugging_face
):
    """Steps 5 to 9 of a run of 8 rows, as documents, against those of the uninterrupted run on one rank."""

    def documents(batches):
        return Counter(
            tuple(document.tolist())
            for batch in batches
            for document in batch.tokens_T[: sum(batch.document_lengths)].split(list(batch.document_lengths))
        )

    assert 0 < 5 * 8 % mixture.rows_per_epoch(0) < mixture.rows_per_epoch(0) - 1
    sizes = {"global_batch_size": 8, "micro_batch_size": 1}
    whole = list(mixture.iterate(0, 10, **sizes))[5:]
    sources = [dataset / "train.json"] * 2
    resumed = [
        build(dataset, hugging_face, source=sources, weights=(0.4, 1.5)).iterate(
            5, 10, **sizes, dp_rank=rank, dp_size=dp_size
        )
        for rank in range(dp_size)
    ]
    for expected, *of_ranks in zip(whole, *resumed, strict=True):
        assert documents(expected) == documents([batch for batches in of_ranks for batch in batches])


@pytest.mark.parametrize("num_shares", [1, 2, 3, 7])
def test_image_shares_join_to_all_images(num_shares, data):
    whole = data.step_batches(1, **SIZES, image_share=(0, 1))
    shares = [data.step_batches(1, **SIZES, image_share=(i, num_shares)) for i in range(num_shares)]
    for micro_batch, expected in enumerate(whole):
        parts = [share[micro_batch].pixels for share in shares]
        assert torch.equal(torch.cat(parts), expected.pixels)
        assert all(part.shape[1] == PROCESSOR.patch_dim for part in parts)
    assert all(batch.pixels is None for batch in data.step_batches(1, **SIZES))


@pytest.fixture
def text_only(tmp_path):
    turns = [{"from": "human", "value": "why?"}, {"from": "gpt", "value": "They are 1, 2 and 3."}]
    path = tmp_path / "text.jsonl"
    path.write_text("\n".join(json.dumps({"id": i, "conversations": turns}) for i in range(10)))
    return path


@pytest.mark.parametrize(
    ("processor", "expected"), [(None, None), (PROCESSOR, (0, PROCESSOR.patch_dim))], ids=["none", "patches"]
)
def test_text_without_any_image(processor, expected, text_only, hugging_face):
    data = build(text_only.parent, hugging_face, source=text_only, image_processor=processor)
    (batch,) = data.step_batches(0, global_batch_size=2, micro_batch_size=2, image_share=(0, 2))
    assert batch.image_grids == batch.image_keys == ()
    assert batch.visual_rows_N.shape == (0,)
    assert batch.visual_rows_N.dtype == torch.int64
    assert batch.pixels is None if expected is None else batch.pixels.shape == expected


def test_overlong_samples(dataset, hugging_face):
    with pytest.raises(
        DataError,
        match=r"sample 'sample\d+' has \d+ tokens, more than seq_length=100; raise seq_length to \d+",
    ):
        build(dataset, hugging_face, seq_length=100)
    data = build(dataset, hugging_face, seq_length=100, overlong="drop")
    assert 0 < data.num_dropped < 40
    assert len(data.samples) == len(data.lengths) == 40 - data.num_dropped
    assert data.lengths.max() <= 100
    with pytest.raises(DataError, match="every sample is longer than seq_length=8"):
        build(dataset, hugging_face, seq_length=8, overlong="drop")


BAD_SETTINGS = {
    "overlong": ({"overlong": "cut"}, "overlong='cut'; use 'error', 'drop' or 'truncate'"),
    "no processor": ({"image_processor": None}, "'sample1' has images but there is no image processor"),
    "no file": ({"source": "nowhere.json"}, r"nowhere\.json: no such file"),
}


@pytest.mark.parametrize(("settings", "message"), BAD_SETTINGS.values(), ids=BAD_SETTINGS.keys())
def test_bad_settings(settings, message, dataset, hugging_face):
    with pytest.raises(DataError, match=message):
        build(dataset, hugging_face, **settings)


def test_batch_sizes_that_do_not_divide(data):
    with pytest.raises(
        DataError, match=r"global_batch_size=8 is not divisible .* 3 \* 2; use a multiple of 6"
    ):
        data.step_batches(0, global_batch_size=8, micro_batch_size=3, dp_size=2)


def test_an_image_header_that_cannot_be_read_is_named_at_construction(tmp_path, hugging_face):
    (tmp_path / "bad.png").write_bytes(b"<html>")
    turns = [{"from": "human", "value": "<image>?"}, {"from": "gpt", "value": "no"}]
    (tmp_path / "train.json").write_text(json.dumps([{"image": "bad.png", "conversations": turns}]))
    with pytest.raises(DataError, match=r"bad\.png: not an image"):
        build(tmp_path, hugging_face)


def data_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("laver-data")]


def test_closing_the_iterator_ends_its_thread(data):
    steps = data.iterate(0, 1000, **SIZES)
    next(steps)
    assert data_threads()
    steps.close()
    assert not data_threads()
    for _ in data.iterate(0, 3, **SIZES):
        pass
    assert not data_threads()


def test_an_error_is_raised_at_its_step_and_ends_the_thread(data, monkeypatch):
    original = StepPlan.reads

    def failing(self, step):
        if step == 2:
            raise DataError("a.jpg: cannot be decoded")
        return original(self, step)

    monkeypatch.setattr(StepPlan, "reads", failing)
    steps = data.iterate(0, 5, **SIZES)
    assert len(next(steps)) == len(next(steps)) == 4
    with pytest.raises(DataError, match=r"a\.jpg: cannot be decoded"):
        next(steps)
    assert not data_threads()


def test_prefetching_stays_two_steps_ahead(data, monkeypatch):
    prepared = []
    monkeypatch.setattr(StepMaker, "make", lambda self, step, reading: prepared.append(step) or [])
    steps = data.iterate(0, 100, **SIZES)
    next(steps)
    deadline = time.monotonic() + 5
    while len(prepared) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)
    assert prepared == [0, 1, 2]
    steps.close()


def test_fingerprint_tells_data_apart(data, dataset, hugging_face, text_only):
    assert build(dataset, hugging_face).fingerprint() == data.fingerprint()
    others = [
        {"seed": 8},
        {"seq_length": 257},
        {"system_prompt": ""},
        {"packing_window": 17},
        {"cost": None},
        {"image_processor": PatchImageProcessor(image_size=16, patch_size=4)},
        {"source": [dataset / "train.json", text_only]},
    ]
    digests = {build(dataset, hugging_face, **other).fingerprint() for other in others}
    assert len(digests | {data.fingerprint()}) == len(others) + 1


def test_prompts_are_laid_out_as_documents(hugging_face):
    turns = [Turn("user", "<image>which digits?")]
    prompts = [encode_prompt(turns, [grid], hugging_face) for grid in ((2, 3), (1, 1))]
    batch = collate(prompts, ["a", "b"], total_length=128, pad_id=hugging_face.special.pad)
    assert batch.supervised_rows_M.shape == (0,)
    assert batch.image_keys == (("a", 0), ("b", 0))
    assert batch.layout.intervals.blocks == (0, len(prompts[0]), len(prompts[0]) + len(prompts[1]), 128)
    assert batch.layout.positions_3S[:, len(prompts[0])].tolist() == [0, 0, 0]
    used = len(prompts[0]) + len(prompts[1])
    trimmed, shorter = (
        batch.trimmed(used + 3),
        collate(prompts, ["a", "b"], total_length=used + 3, pad_id=hugging_face.special.pad),
    )
    assert torch.equal(trimmed.tokens_T, shorter.tokens_T)
    assert torch.equal(trimmed.labels_T, shorter.labels_T)
    assert trimmed.layout.intervals.blocks == shorter.layout.intervals.blocks
    with pytest.raises(ValueError, match=f"length={used - 1} cuts documents"):
        batch.trimmed(used - 1)
    with pytest.raises(DataError, match="2 samples hold"):
        collate(prompts, ["a", "b"], total_length=16, pad_id=0)
