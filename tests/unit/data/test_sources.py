"""JSON, parquet and prepared shards give the same kind of sample, read where it lies."""

import json
import tarfile

import pytest
from corpora import encode, picture, write_finevision, write_llava, write_onevision

from laver_mcore.data.errors import DataError
from laver_mcore.data.images.decode import open_image
from laver_mcore.data.images.source import read_image_bytes
from laver_mcore.data.records.conversation import load_records
from laver_mcore.data.records.finevision import RatingFilter
from laver_mcore.data.records.sample import IMAGE_PLACEHOLDER, Turn, typed_turn
from laver_mcore.data.records.sources import open_source

TEXTS = ["naïve ünïcode 漢字 🙂", 'quotes " and \\ backslash', "line\u2028separator"]


def read_all(source):
    return [source.read(locator) for locator in source.scan()]


@pytest.mark.parametrize("form", ["json", "indented", "jsonl", "bom"])
def test_json_records_are_found_again_by_their_bytes(form, tmp_path):
    records = [
        {"id": str(i), "conversations": [{"from": "human", "value": text}, {"from": "gpt", "value": "a"}]}
        for i, text in enumerate(TEXTS * 3)
    ]
    path = tmp_path / "data.json"
    if form == "jsonl":
        path.write_bytes("\n\n".join(json.dumps(r, ensure_ascii=False) for r in records).encode())
    else:
        text = json.dumps(records, ensure_ascii=False, indent=2 if form == "indented" else None)
        path.write_bytes((b"\xef\xbb\xbf" if form == "bom" else b"") + text.encode())
    found = read_all(open_source(path, tmp_path))
    assert found == load_records(path)
    assert [sample.turns[0].text for sample in found] == TEXTS * 3


def test_a_record_that_moved_is_noticed(tmp_path):
    path = write_llava(tmp_path, {"a.jpg": encode(picture())})
    source = open_source(path, tmp_path)
    locators = list(source.scan())
    path.write_text(" " * 9 + path.read_text())
    with pytest.raises(DataError, match="record 1: the file has changed since it was indexed"):
        source.read(locators[1])


def test_onevision_rows(tmp_path):
    pytest.importorskip("pyarrow")
    samples = read_all(open_source(write_onevision(tmp_path / "a.parquet"), tmp_path))
    assert [sample.key for sample in samples] == [f"r{n}" for n in range(12)]
    assert [len(sample.images) for sample in samples[:3]] == [1, 1, 0]
    # A missing placeholder puts the image in front of the question.
    assert samples[0].turns == (*samples[3].turns[:1], Turn("assistant", "row 0"))
    assert samples[1].turns[0] == Turn("user", "<image>\nwhich?")
    for number in (0, 4, 10):
        assert read_image_bytes(samples[number].images[0]) == encode(picture(seed=number))


def test_finevision_rows(tmp_path):
    pytest.importorskip("pyarrow")
    samples = read_all(open_source(write_finevision(tmp_path / "a.parquet"), tmp_path))
    assert [len(sample.images) for sample in samples] == [0, 1, 2] * 3
    first = samples[2].turns[0]
    assert first.split() == ["", "\n", "\nwrite <image> in plain text"]  # quoted, so no third image
    assert first.num_images == 2
    assert [turn.role for turn in samples[2].turns] == ["user", "assistant"] * 2
    assert open_image(samples[8].images[1]).size == (40, 30)


def test_rating_filter_drops_turns_and_then_rows(tmp_path):
    pytest.importorskip("pyarrow")
    path = write_finevision(tmp_path / "a.parquet")
    filtered = read_all(open_source(path, tmp_path, RatingFilter(relevance=3)))
    assert [len(sample.turns) for sample in filtered] == [2, 2, 4, 4, 4, 2, 2, 4, 4]
    source = open_source(path, tmp_path, RatingFilter(relevance=6))
    with pytest.raises(DataError, match="row 0: no turn passes the rating filter"):
        source.read(next(source.scan()))
    assert source.fingerprint() != open_source(path, tmp_path).fingerprint()


@pytest.mark.parametrize(
    ("role", "pieces", "typed"),
    [
        ("user", ["a"], False),
        ("user", ["", "\nq"], False),
        ("user", ["quoting <image> here"], True),
        ("user", ["", "<image>"], True),
        ("assistant", ["<image>"], False),
    ],
)
def test_typed_turns_are_typed_only_where_needed(role, pieces, typed):
    turn = typed_turn(role, pieces)
    assert turn.split() == pieces
    assert (turn.pieces is not None) == typed
    assert turn.text == IMAGE_PLACEHOLDER.join(pieces)


def test_unusable_sources(tmp_path):
    with pytest.raises(DataError, match=r"holds neither manifest\.json, .*\*\.parquet nor \*\.tar"):
        open_source(tmp_path, tmp_path)
    pytest.importorskip("pyarrow")
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 but not really")
    with pytest.raises(DataError, match=r"bad\.parquet: not a parquet file"):
        list(open_source(tmp_path / "bad.parquet", tmp_path).scan())
    assert not tarfile.is_tarfile(tmp_path / "bad.parquet")
