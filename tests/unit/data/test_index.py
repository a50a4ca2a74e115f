"""The index: measured once, found again, equal to reading everything, and honest about bad samples."""

import json
import multiprocessing
import pickle
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
from corpora import encode, picture, write_llava

from laver_mcore.data.errors import DataError
from laver_mcore.data.images.processors import PatchImageProcessor
from laver_mcore.data.order import index as index_module
from laver_mcore.data.order.index import FOLDER, get_index
from laver_mcore.data.records.sources import open_source
from laver_mcore.data.sequence.prompt import encode_sample
from laver_mcore.data.serve.loader import DialogueData

PROCESSOR = PatchImageProcessor(image_size=16, patch_size=8)


@pytest.fixture
def corpus(tmp_path, monkeypatch):
    monkeypatch.setattr(index_module, "_CACHED_FROM", 5)
    return write_llava(tmp_path, {f"{n}.jpg": encode(picture(20 + n, 30, seed=n)) for n in range(8)})


def build(path, tokenizer, **changes):
    settings = {"image_processor": PROCESSOR, "seq_length": 200, "seed": 0, "tokenizer": tokenizer}
    return DialogueData(path, **settings | changes)


def test_a_large_set_is_measured_once(corpus, hugging_face, monkeypatch):
    first = get_index(open_source(corpus, corpus.parent), hugging_face, "", folder=corpus.parent / FOLDER)
    monkeypatch.setattr(index_module, "measure", lambda *_: pytest.fail("measured again"))
    again = get_index(open_source(corpus, corpus.parent), hugging_face, "", folder=corpus.parent / FOLDER)
    assert again.folder is not None
    for name in index_module._ARRAYS:
        assert (getattr(first, name) == getattr(again, name)).all()
    assert [again.sample(n).key for n in range(10)] == [f"s{n}" for n in range(8)] + ["t0", "t1"]
    copy = pickle.loads(pickle.dumps(again))
    assert copy.sample(3) == again.sample(3)


@pytest.mark.parametrize("change", ["data", "tokenizer", "system prompt"])
def test_what_it_was_measured_from_is_its_key(change, corpus, hugging_face, sentencepiece_path):
    from laver_mcore.data.sequence.tokenizer import load_tokenizer

    folder = corpus.parent / FOLDER
    get_index(open_source(corpus, corpus.parent), hugging_face, "", folder=folder)
    tokenizer, prompt = hugging_face, ""
    if change == "data":
        corpus.write_text(corpus.read_text().replace("row 3", "row 3 of the page"))
    elif change == "tokenizer":
        tokenizer = load_tokenizer(sentencepiece_path)
    else:
        prompt = "You are a helpful assistant."
    get_index(open_source(corpus, corpus.parent), tokenizer, prompt, folder=folder)
    assert len([path for path in folder.iterdir() if path.is_dir()]) == 2


def test_processes_that_ask_at_once_get_the_same(corpus, hugging_face, monkeypatch):
    """Threads here: a file lock keeps apart whoever opened the file, in one process or in several."""
    measured = []
    original = index_module.measure

    def measure(*arguments):
        measured.append(arguments)
        time.sleep(0.2)
        return original(*arguments)

    monkeypatch.setattr(index_module, "measure", measure)
    folder = corpus.parent / FOLDER
    ask = partial(get_index, open_source(corpus, corpus.parent), hugging_face, "", folder=folder)
    with ThreadPoolExecutor(3) as pool:
        answers = [future.result() for future in [pool.submit(ask) for _ in range(3)]]
    assert len(measured) == 1
    assert all((answer.text_lengths == answers[0].text_lengths).all() for answer in answers)


def test_another_image_processor_needs_no_new_index(corpus, hugging_face, monkeypatch):
    small = build(corpus, hugging_face)
    monkeypatch.setattr(index_module, "measure", lambda *_: pytest.fail("measured again"))
    large = build(corpus, hugging_face, image_processor=PatchImageProcessor(image_size=32, patch_size=8))
    assert sorted(set((large.lengths - small.lengths).tolist())) == [0, 12]


def test_bad_samples_are_listed_and_left_out(corpus, hugging_face, tmp_path):
    (corpus.parent / "3.jpg").write_bytes(b"<html>")
    (corpus.parent / "5.jpg").unlink()
    data = build(corpus, hugging_face, max_bad_fraction=0.2, quarantine=tmp_path / "q" / "quarantine.jsonl")
    assert len(data.samples) == 8
    assert {data.samples.key(n) for n in range(8)} == {"s0", "s1", "s2", "s4", "s6", "s7", "t0", "t1"}
    rows = [json.loads(line) for line in (tmp_path / "q" / "quarantine.jsonl").read_text().splitlines()]
    assert [("3.jpg" in row["reason"], "5.jpg" in row["reason"]) for row in rows] == [
        (True, False),
        (False, True),
    ]
    with pytest.raises(
        DataError, match=r"3\.jpg: not an image .*2 of 10 samples are bad, more than max_bad_frac"
    ):
        build(corpus, hugging_face, max_bad_fraction=0.1)


def test_sets_are_numbered_and_keep_their_keys_apart(corpus, hugging_face):
    data = build([corpus, corpus], hugging_face, weights=(1, 0.5))
    assert len(data.samples) == 20
    assert {data.samples.key(n) for n in (0, 10)} == {"0/s0", "1/s0"}
    assert data.samples[10].turns == data.samples[0].turns
    assert data.fingerprint() != build([corpus, corpus], hugging_face).fingerprint()


def test_a_break_behind_many_records_is_named_without_measuring_them_first(corpus, hugging_face, monkeypatch):
    record = json.loads(corpus.read_text())[0]
    corpus.write_text(json.dumps([record] * 400)[:-1] + ", {")
    monkeypatch.setattr(index_module, "_CHUNK", 4)
    monkeypatch.setattr(index_module, "measure", lambda *_: pytest.fail("measured here"))
    source = open_source(corpus, corpus.parent)
    with pytest.raises(DataError, match="broken JSON"):
        get_index(source, hugging_face, "", num_workers=1, folder=corpus.parent / FOLDER)
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("prompt", ["", "You are a helpful assistant."])
def test_text_lengths_are_those_of_whole_prompts_around_images_of_no_token(corpus, hugging_face, prompt):
    index = get_index(open_source(corpus, corpus.parent), hugging_face, prompt)
    samples = [index.sample(number) for number in range(len(index))]
    whole = [
        encode_sample(s.turns, [(0, 0)] * len(s.images), hugging_face, system_prompt=prompt) for s in samples
    ]
    assert index.text_lengths.tolist() == [len(each.token_ids_L) for each in whole]
