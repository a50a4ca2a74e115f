"""Files, tables and folders that people have: read, or refused with the first reason."""

import json
import re
from pathlib import Path

import pytest
from corpora import encode, picture

from laver_mcore.cli import prepare
from laver_mcore.data.errors import DataError
from laver_mcore.data.order import index as index_module
from laver_mcore.data.order.index import get_index
from laver_mcore.data.records.conversation import load_records
from laver_mcore.data.records.sources import open_source

ROOT = Path(__file__).resolve().parents[3]
JPEG = encode(picture())
TURNS = [{"from": "human", "value": "<image>\nq"}, {"from": "gpt", "value": "1."}]
RECORD = {"id": "x", "image": "a.jpg", "conversations": TURNS}
MESSAGES = [{"role": "user", "content": "<image>\nq"}, {"role": "assistant", "content": "1."}]


def dump(value, **options):
    return json.dumps(value, **options)


# Text of a file -> the number of records in it, or the error.
FILES = {
    "list under data": (dump({"data": [RECORD] * 3}), 3),
    "list under data, indented, more behind": (dump({"data": [RECORD] * 2, "version": 1}, indent=1), 2),
    "list under annotations": (dump({"annotations": [RECORD]}), 1),
    "list under data, behind others": (dump({"version": 1, "data": [RECORD]}), "records under 'data'"),
    "list under an unknown name": (dump({"rows": [RECORD]}), "no conversation"),
    "one pretty-printed record": (dump(RECORD, indent=2), 1),
    "one record in a line": (dump(RECORD), 1),
    "several lines": (dump(RECORD) + "\n" + dump(RECORD), 2),
    "two pretty-printed records": (dump(RECORD, indent=2) + "\n" + dump(RECORD, indent=2), "broken JSON"),
    "a cut list under data": (dump({"data": [RECORD] * 3})[:-20], "broken JSON"),
    "an integer of 5,000 digits": ('[{"id": ' + "1" * 5000 + "}]", "JSON that cannot be read"),
    "brackets 100,000 deep": ("[" * 100_000, "broken JSON|nested|cannot be read"),
}


@pytest.mark.parametrize(("text", "want"), FILES.values(), ids=FILES)
def test_json_files(text, want, tmp_path):
    (tmp_path / "a.jpg").write_bytes(JPEG)
    path = tmp_path / "train.json"
    path.write_text(text)
    if isinstance(want, str):
        with pytest.raises(DataError, match=want):
            load_records(path, tmp_path)
        return
    source = open_source(path, tmp_path)
    found = [source.read(locator) for locator in source.scan()]
    assert [sample.key for sample in found] == ["x"] * want
    assert [sample.turns for sample in found] == [sample.turns for sample in load_records(path, tmp_path)]


BYTES = [{"bytes": JPEG, "path": None}]
# Columns of a table of two rows -> keys and number of images of each row that is read, or the error of the first.
TABLES = {
    "id of type double": ({"id": [1.0, 2.0], "image": BYTES * 2}, [("1", 1), ("2", 1)]),
    "id partly null, so double": ({"id": [7.0, None], "image": BYTES * 2}, [("7", 1), ("train:0:1", 1)]),
    "images null beside image": ({"images": [None, None], "image": BYTES * 2}, [("train:0:0", 1)] * 1),
    "conversations as JSON strings": ({"conversations": [dump(TURNS)] * 2, "image": BYTES * 2}, 2),
    "conversations as structs of lists": (
        {"conversations": [{"from": ["human", "gpt"], "value": ["q", "1."]}] * 2, "image": BYTES * 2},
        2,
    ),
    "conversations null beside messages": (
        {"conversations": [None] * 2, "messages": [MESSAGES] * 2, "image": BYTES * 2},
        2,
    ),
    "FineVision with a null turn": (
        {"texts": [[None, {"user": "q", "assistant": "a"}]] * 2, "images": [BYTES] * 2},
        r"texts\[0\] lacks user or assistant",
    ),
    "an image by its path alone": (
        {"image": [{"bytes": None, "path": "a.jpg"}] * 2},
        "embed the images in the file",
    ),
}


@pytest.mark.parametrize(("columns", "want"), TABLES.values(), ids=TABLES)
def test_tables(columns, want, tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    if not {"conversations", "texts"} & set(columns):
        columns = columns | {"conversations": [TURNS] * 2}
    parquet.write_table(pyarrow.table(columns), tmp_path / "train.PARQUET")
    source = open_source(tmp_path / "train.PARQUET", tmp_path)
    locators = list(source.scan())
    if isinstance(want, str):
        with pytest.raises(DataError, match=want):
            source.read(locators[0])
        return
    found = [(sample.key, len(sample.images)) for sample in map(source.read, locators)]
    assert len(found) == 2
    assert all(images == 1 for _, images in found)
    if isinstance(want, list):
        assert found[: len(want)] == want
    assert len(list(open_source(tmp_path, tmp_path).scan())) == 2  # a folder, too


def test_images_that_were_moved_away_and_back(hugging_face, tmp_path, monkeypatch):
    monkeypatch.setattr(index_module, "_CACHED_FROM", 5)
    path = tmp_path / "train.json"
    path.write_text(dump([RECORD] * 20))
    ask = lambda: get_index(open_source(path, tmp_path), hugging_face, "", folder=tmp_path / "index")  # noqa: E731
    assert len(ask().bad) == 20
    (tmp_path / "a.jpg").write_bytes(JPEG)
    assert len(ask()) == 20


MISSING = RECORD | {"image": "gone.jpg"}
# Records -> (exit status, what is printed).
PREPARED = {
    "every image missing": ([MISSING] * 9, 1, "gone.jpg' does not exist.*9 of 9 records are rejected"),
    "every record without an answer": ([RECORD | {"conversations": TURNS[:1]}] * 9, 1, "no assistant turn"),
    "a fifth missing": ([RECORD] * 8 + [MISSING] * 2, 1, "2 of 10 records are rejected"),
    "a twentieth missing": ([RECORD] * 19 + [MISSING], 0, "1 rejected: 1 image"),
    "a video": ([RECORD] * 19 + [RECORD | {"video": "v.mp4"}], 0, "1 rejected: 1 video"),
    "all good": ([RECORD] * 3, 0, r"3 samples with 3 images in 1 shards; 0 rejected$"),
}


@pytest.mark.parametrize(("records", "status", "said"), PREPARED.values(), ids=PREPARED)
def test_preparation_of_whole_sets(records, status, said, tmp_path, capsys):

    (tmp_path / "a.jpg").write_bytes(JPEG)
    (tmp_path / "train.json").write_text(dump(records))
    arguments = ["--input", tmp_path / "train.json", "--format", "llava", "--output", tmp_path / "out"]
    assert prepare.main([*map(str, arguments), "--workers", "1"]) == status
    out, err = capsys.readouterr()
    assert re.search(said, (err if status else out).strip())
    assert (tmp_path / "out" / "manifest.json").is_file() == (status == 0)
