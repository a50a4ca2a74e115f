"""Records that people have: each is read as its author meant, or refused by name, and its neighbours go on.

`cases/records.jsonl` holds one record a line (`case`, `input`, `want`). Where a folder `shared/cases` lies beside the
repository, its cases are run too.
"""

import json
import re
from pathlib import Path

import pytest
from corpora import encode, picture

from laver_mcore.data.order.index import get_index
from laver_mcore.data.prepare.convert import ConvertOptions, convert, open_corpus
from laver_mcore.data.records.sample import Sample
from laver_mcore.data.records.sources import open_source

HERE = Path(__file__).parent / "cases"
FOLDERS = [HERE, Path(__file__).resolve().parents[3].parent / "shared" / "cases"]
GOOD = {
    "image": "a.jpg",
    "conversations": [{"from": "human", "value": "<image>\nq"}, {"from": "gpt", "value": "1."}],
}


def cases():
    """Every case of every folder that is there, once."""
    found = {}
    for folder in FOLDERS:
        file = folder / "records.jsonl"
        for line in file.read_text().splitlines() if file.is_file() else ():
            case = json.loads(line)
            found[case["case"]] = case["input"]
    return found


# What has to come of a case: (texts of its turns, number of images), or a pattern of the one line that refuses it.
WHICH = (["<image>\nWhich digits?", "1 2."], 1)
OUTSIDE = r"lies outside .*give the folder that holds the images, or allow_outside_images"
WANT = {
    "lone surrogate in a question": r"U\+D83D at character 18 is half of a surrogate pair",
    "lone surrogate in an answer": r"U\+D83D at character 4 is half of a surrogate pair",
    "lone surrogate in an id": r"U\+D83D at character 1 is half of a surrogate pair",
    "image is a long base64 string": r"image '.{40,170}\.\.\..*' does not exist",
    "image is a data URI": "cannot be decoded|not an image",
    "image name of 300 characters": r"image '.{40,170}\.\.\..*' does not exist",
    "video record": "video is not read, only images",
    "id null": WHICH,
    "id 17.0": WHICH,
    "image null, text only": (["hi", "ho"], 0),
    "image NaN, text only (as pandas writes it)": (["hi", "ho"], 0),
    "conversations null beside messages": (["<image>\nq", "1."], 1),
    "from null beside role": (["<image>\nq", "1."], 1),
    "conversations as a JSON string": WHICH,
    "conversations as a struct of lists": (["<image>\nq", "1."], 1),
    "Qwen-style image part": (["<image>Which?", "1."], 1),
    "image outside the folder": OUTSIDE,
    "absolute image path": OUTSIDE,
    "special tokens in a question": (["<image>\n<|im_end|> hi <|image_pad|>", "1."], 1),
    "one good record, for comparison": WHICH,
}
KEYS = {"id null": "train.json:1", "id 17.0": "17"}
KINDS = {"video record": "video"} | dict.fromkeys(
    [
        "image is a long base64 string",
        "image is a data URI",
        "image name of 300 characters",
        "image outside the folder",
        "absolute image path",
    ],
    "image",
)


def test_every_case_is_expected():
    assert set(cases()) == set(WANT)


@pytest.fixture
def write(tmp_path):
    """Writes a record between two good ones, with its image beside them."""
    (tmp_path / "a.jpg").write_bytes(encode(picture()))

    def to(record):
        path = tmp_path / "train.json"
        path.write_text(json.dumps([GOOD | {"id": "first"}, record, GOOD | {"id": "last"}]))
        return path

    return to


@pytest.mark.parametrize(("case", "record"), cases().items(), ids=cases())
def test_reader_and_index(case, record, write, hugging_face):
    path, want = write(record), WANT[case]
    index = get_index(open_source(path, path.parent), hugging_face, "")
    assert {index.key(0), index.key(len(index) - 1)} == {"first", "last"}
    if isinstance(want, str):
        ((_, why, kind),) = index.bad
        assert kind == KINDS.get(case, "record")
        assert len(index) == 2
        assert "\n" not in why
        assert len(why) < 600
        assert re.search(want, why)
        return
    assert not index.bad
    sample = index.sample(1)
    check(sample, want)
    assert sample.key == KEYS.get(case, "x")


def check(sample: Sample, want):
    texts, num_images = want
    assert [turn.text for turn in sample.turns] == texts
    assert len(sample.images) == num_images


@pytest.mark.parametrize(("case", "record"), cases().items(), ids=cases())
def test_preparation(case, record, write, tmp_path):
    path, want = write(record), WANT[case]
    options = ConvertOptions(format="llava")
    rejects = []
    for output in (tmp_path / "one", tmp_path / "two"):
        manifest = convert(
            open_corpus(path, None, options), output, options, num_workers=1, max_bad_fraction=0.5
        )
        rejects.append((output / "rejects.jsonl").read_text())
    assert rejects[0] == rejects[1]
    assert "0x" not in rejects[0]
    if isinstance(want, str):
        assert manifest["num_samples"] == 2
        assert manifest["rejects_by_kind"] == {KINDS.get(case, "record"): 1}
    else:
        prepared = open_source(tmp_path / "one", tmp_path)
        samples = {sample.key: sample for sample in map(prepared.read, prepared.scan())}
        check(samples[KEYS.get(case, "x")], want)
