"""Images that fail during a run: the sample is silenced, the run goes on, the same on every rank."""

import json
import threading

import pytest
import torch
from corpora import encode, picture, write_llava

from laver_mcore.data.errors import DataError
from laver_mcore.data.images.processors import PatchImageProcessor
from laver_mcore.data.sequence.prompt import IGNORE
from laver_mcore.data.serve.assemble import Readers
from laver_mcore.data.serve.loader import DialogueData
from laver_mcore.data.serve.steps import StepLayout
from laver_mcore.data.serve.workers import Inline

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
            lost = set(whole.image_keys) - set(batch.image_keys)
            assert {key for key, _ in lost} <= {f"s{number}" for number in BAD}
            assert len(batch.pixels) == len(batch.visual_rows_N) == 4 * batch.num_images
            assert (batch.labels_T != IGNORE).sum() == len(batch.supervised_rows_M)
            same_tokens = [
                torch.equal(batch.tokens_T[rows], whole.tokens_T[rows]) for rows in documents(whole)
            ]
            assert same_tokens.count(False) == len(lost)  # a lost sample is blank, its neighbours are not
            num_lost_labels = len(whole.supervised_rows_M) - len(batch.supervised_rows_M)
            assert (num_lost_labels > 0) == bool(lost)
            batch.layout.intervals.validate()
            num_images += batch.num_images
            num_samples += batch.num_samples
    rows = [json.loads(line) for line in (tmp_path / "quarantine.jsonl").read_text().splitlines()]
    read = {data.samples.key(number) for row in range(4 * steps) for number in data.row(row)}
    assert sorted(row["sample"] for row in rows) == sorted(read & {f"s{number}" for number in BAD})
    assert len(rows) >= 2, "choose a seed whose steps hold bad samples"
    assert all("cannot be decoded" in row["reason"] for row in rows)
    texts = {key for key in read if key.startswith("t")}  # of the others each has an image
    assert num_samples - num_images == len(rows) + len(texts)


def test_ranks_that_see_different_images_end_up_with_the_same_batches(damaged, hugging_face):
    """Two tensor-parallel ranks, each decoding half the images, exchanging what failed as the loop does."""
    data = [build(damaged, hugging_face) for _ in range(2)]
    steps = 6
    alone = list(build(damaged, hugging_face).iterate(0, steps, **SIZES, image_share=(0, 1)))
    answers, exchanges = run_ranks(data, steps)
    assert [each.num_reads for each in exchanges] == [steps, 0]  # one rank reads for both
    assert any(
        keys(a) != keys(b) for a, b in zip(alone, clean_steps(damaged, hugging_face, steps), strict=True)
    )
    for expected, first, second in zip(alone, *answers, strict=True):
        for whole, a, b in zip(expected, first, second, strict=True):
            assert whole.image_keys == a.image_keys == b.image_keys
            assert torch.equal(whole.labels_T, a.labels_T)
            assert torch.equal(whole.labels_T, b.labels_T)
            assert torch.equal(torch.cat([a.pixels, b.pixels]), whole.pixels)


def documents(batch):
    ends = torch.tensor(batch.document_lengths).cumsum(0).tolist()
    return [slice(end - length, end) for end, length in zip(ends, batch.document_lengths, strict=True)]


def keys(batches):
    return [batch.image_keys for batch in batches]


def clean_steps(damaged, tokenizer, steps):
    data = build(damaged, tokenizer)
    return [data.step_batches(step, **SIZES) for step in range(steps)]


class Threads:
    """An exchange between ranks that are threads of this process: two data-parallel ranks of two ranks each."""

    def __init__(self, board, rank, replica_size=2):
        self._board, self._rank, self._size = board, rank, replica_size
        self.reads = rank % replica_size == 0
        self.num_reads = 0

    def from_first_rank(self, make):
        first = self._rank - self._rank % self._size
        if self._rank == first:
            self.num_reads += 1
            self._board["read"][first].append(make())
            for barrier in self._board["replicas"][first // self._size]:
                barrier.wait(60)
        else:
            for barrier in self._board["replicas"][first // self._size]:
                barrier.wait(60)
        return self._board["read"][first][-1]

    def gather(self, value):
        self._board["said"][self._rank] = value
        self._board["world"].wait(60)
        found = [each for each in self._board["said"] if each is not None]
        self._board["world"].wait(60)
        return found

    def close(self):
        pass


def run_ranks(ranks, steps, replica_size=2):
    """Run `iterate` on every rank in a thread of its own; what each got, an error in its place if it raised."""
    num_replicas = len(ranks) // replica_size
    board = {
        "said": [None] * len(ranks),
        "read": {replica * replica_size: [] for replica in range(num_replicas)},
        "world": threading.Barrier(len(ranks)),
        "replicas": [[threading.Barrier(replica_size)] for _ in range(num_replicas)],
    }
    answers = [[] for _ in ranks]
    exchanges = [Threads(board, rank, replica_size) for rank in range(len(ranks))]

    def run(rank):
        layout = {"dp_rank": rank // replica_size, "dp_size": num_replicas}
        layout["image_share"] = (rank % replica_size, replica_size)
        try:
            for batches in ranks[rank].iterate(
                0, steps, exchange=exchanges[rank], prefetch_steps=0, **SIZES, **layout
            ):
                answers[rank].append(batches)
        except DataError as error:
            answers[rank].append(error)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(len(ranks))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    return answers, exchanges


def last_good_step(data, bad, fraction, num_steps):
    """How many steps pass until more than `fraction` of the samples read so far, and more than eight, have failed."""
    seen, failed = 0, set()
    for step in range(num_steps):
        members = [number for row in range(4 * step, 4 * step + 4) for number in data.row(row)]
        seen += len(members)
        found = {data.samples.key(number) for number in members} & bad
        failed |= found
        if found and len(failed) > max(8, fraction * seen):
            return step
    return num_steps


@pytest.mark.parametrize(
    ("every", "fraction"), [(1, 0.1), (2, 0.1), (4, 0.25), (4, 0.3), (2, 0.5), (20, 0.0)], ids=str
)
def test_too_many_failures_stop_the_run_at_their_step(every, fraction, tmp_path, hugging_face):
    """Every `every`-th image is bad; the step at which that is too much is found by counting."""
    pictures = {f"{n}.jpg": encode(picture(seed=n))[: None if n % every else 700] for n in range(60)}
    path = write_llava(tmp_path, pictures)
    data = build(path, hugging_face, max_bad_fraction=fraction)
    expected = last_good_step(data, {f"s{n}" for n in range(0, 60, every)}, fraction, 12)
    steps = data.iterate(0, 12, **SIZES, image_share=(0, 1))
    for _ in range(expected):
        next(steps)
    if expected < 12:
        message = f"cannot be decoded .*samples are bad, more than max_bad_fraction={fraction}"
        with pytest.raises(DataError, match=message):
            next(steps)
    steps.close()


def test_a_step_counts_the_samples_of_all_ranks(damaged, hugging_face):
    data = build(damaged, hugging_face)
    for step in range(4):
        ranks = [{"dp_rank": rank, "dp_size": 2} for rank in range(2)]
        plan = data._plan(StepLayout(**SIZES, **ranks[0]))
        of_ranks = [data.step_batches(step, **SIZES, **rank) for rank in ranks]
        assert plan.num_samples(step) == sum(batch.num_samples for of in of_ranks for batch in of)


def test_too_many_failures_stop_all_ranks_at_the_same_step(tmp_path, hugging_face):
    """Two data-parallel ranks of two: bad images in the rows of some of them, the same error on all."""
    pictures = {f"{n}.jpg": encode(picture(seed=n))[: 700 if n % 4 == 0 else None] for n in range(60)}
    path = write_llava(tmp_path, pictures)
    files = [tmp_path / f"quarantine{rank}.jsonl" for rank in range(4)]
    ranks = [build(path, hugging_face, quarantine=file) for file in files]
    answers, _ = run_ranks(ranks, 20)
    assert len({len(of_rank) for of_rank in answers}) == 1
    assert len(answers[0]) > 1, "some steps pass"
    assert {str(of_rank[-1]) for of_rank in answers} == {str(answers[0][-1])}
    assert "are bad, more than max_bad_fraction=0.1" in str(answers[0][-1])
    listed = [line for file in files if file.exists() for line in file.read_text().splitlines()]
    assert len(set(listed)) == len(listed)  # the rank that found it writes it down


def test_an_error_on_one_rank_stops_all(damaged, hugging_face, monkeypatch):
    ranks = [build(damaged, hugging_face) for _ in range(4)]
    original = ranks[3]._make_pixels
    calls = []

    def failing(images):
        calls.append(len(images))
        if len(calls) > 4:
            raise MemoryError("no room")
        return original(images)

    ranks[3]._inline = lambda: Inline(Readers(dialogues=ranks[3].samples, make_pixels=failing))
    answers, _ = run_ranks(ranks, 20)
    assert len({len(of_rank) for of_rank in answers}) == 1
    assert all("no room" in str(of_rank[-1]) for of_rank in answers)
