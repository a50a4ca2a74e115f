"""Records that are accepted, and one clear line for each that is not."""

import json

import pytest

from laver_mcore.data.errors import DataError
from laver_mcore.data.records.conversation import load_records, typed_pieces
from laver_mcore.data.records.sample import Turn

HUMAN = {"from": "human", "value": "<image>\nwhat?"}
GPT = {"from": "gpt", "value": "a cat"}
SAMPLE = {"id": "1", "image": "a.png", "conversations": [HUMAN, GPT]}
TEXT_ONLY = {"conversations": [{"from": "user", "value": "why?"}, {"from": "assistant", "value": "so"}]}


@pytest.fixture
def folder(tmp_path):
    for name in ("a.png", "b.png"):
        (tmp_path / name).touch()
    return tmp_path


def load(folder, content, name="data.json"):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return load_records(path, folder)


ACCEPTED = {
    "llava": (SAMPLE, ["user", "assistant"], ["a.png"]),
    "image list": (SAMPLE | {"image": ["a.png"]}, ["user", "assistant"], ["a.png"]),
    "two images": (
        {
            "images": ["b.png", "a.png"],
            "conversations": [{"from": "human", "value": "<image><image>?"}, GPT],
        },
        ["user", "assistant"],
        ["b.png", "a.png"],
    ),
    "images in two turns": (
        {"images": ["b.png", "a.png"], "conversations": [HUMAN, GPT, HUMAN, GPT]},
        ["user", "assistant", "user", "assistant"],
        ["b.png", "a.png"],
    ),
    "text only": (TEXT_ONLY, ["user", "assistant"], []),
    "null image": (TEXT_ONLY | {"image": None}, ["user", "assistant"], []),
    "system turn": (
        SAMPLE | {"conversations": [{"from": "system", "value": "Be brief."}, HUMAN, GPT]},
        ["system", "user", "assistant"],
        ["a.png"],
    ),
    "system field": (SAMPLE | {"system": "Be brief."}, ["system", "user", "assistant"], ["a.png"]),
    "openai": (
        {"messages": [{"role": "user", "content": "why?"}, {"role": "assistant", "content": "so"}]},
        ["user", "assistant"],
        [],
    ),
    "openai parts": (
        {
            "images": ["a.png"],
            "messages": [
                {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what?"}]},
                {"role": "assistant", "content": "a cat"},
            ],
        },
        ["user", "assistant"],
        ["a.png"],
    ),
    "placeholder quoted in an answer": (
        {"conversations": [{"from": "human", "value": "how?"}, {"from": "gpt", "value": "write <image>"}]},
        ["user", "assistant"],
        [],
    ),
}


@pytest.mark.parametrize(("record", "roles", "images"), ACCEPTED.values(), ids=ACCEPTED.keys())
@pytest.mark.parametrize("form", ["json", "jsonl"])
def test_accepted(record, roles, images, form, folder):
    content = json.dumps([record]) if form == "json" else "\n" + json.dumps(record) + "\n\n"
    (sample,) = load(folder, content, f"data.{form}")
    assert [turn.role for turn in sample.turns] == roles
    assert sample.images == tuple(folder / name for name in images)


def test_typed_parts_become_text_with_placeholders(folder):
    (sample,) = load(folder, json.dumps([ACCEPTED["openai parts"][0]]))
    assert sample.turns == (Turn("user", "<image>what?"), Turn("assistant", "a cat"))


IMAGE = {"type": "image"}
PARTS = {
    "image first": ([IMAGE, "what?"], ["", "what?"]),
    "image last": (["what?", IMAGE], ["what?", ""]),
    "image between": (["what ", IMAGE, " then?"], ["what ", " then?"]),
    "two images": ([IMAGE, "or", IMAGE, "?"], ["", "or", "?"]),
    "text in two parts": (["a", "b", IMAGE], ["ab", ""]),
    "text alone": (["why?"], ["why?"]),
}


@pytest.mark.parametrize(("parts", "pieces"), PARTS.values(), ids=PARTS)
def test_typed_pieces_keep_their_order(parts, pieces):
    content = [{"type": "text", "text": part} if isinstance(part, str) else part for part in parts]
    assert typed_pieces(content, "record 0") == pieces


def test_byte_order_mark_and_line_separator(folder):
    text = json.dumps(TEXT_ONLY | {"id": "x"}, ensure_ascii=False).replace("why?", "why\u2028?")
    (sample,) = load(folder, b"\xef\xbb\xbf" + text.encode(), "data.jsonl")
    assert sample.turns[0].text == "why\u2028?"


def test_keys_are_unique_across_files(folder):
    for name in ("x.json", "y.json"):
        (folder / name).write_text(json.dumps([SAMPLE, SAMPLE, TEXT_ONLY, TEXT_ONLY | {"id": 7}]))
    keys = [sample.key for sample in load_records([folder / "x.json", folder / "y.json"], folder)]
    assert keys == ["1", "1#1", "x.json:2", "7", "1#2", "1#3", "y.json:2", "7#1"]


def test_a_generated_key_does_not_collide_with_an_id(folder):
    records = [TEXT_ONLY | {"id": name} for name in ("1#1", "1", "1", "1", "1#1")]
    keys = [sample.key for sample in load(folder, json.dumps(records))]
    assert keys == ["1#1", "1", "1#2", "1#3", "1#1#1"]


def change(**changes):
    return json.dumps([TEXT_ONLY, SAMPLE | changes])


REFUSED = {
    "broken json": (
        "data.json",
        f'[\n{json.dumps(TEXT_ONLY)},\n{{"id": }}]',
        r"data\.json:3: broken JSON at column 8",
    ),
    "broken jsonl": (
        "data.jsonl",
        json.dumps(TEXT_ONLY) + '\n\n{"id": 1',
        r"data\.jsonl:3: broken JSON at column",
    ),
    "missing image": ("data.json", change(image="c.png"), r"record 1: image '.*c\.png' does not exist"),
    "missing image, jsonl": ("data.jsonl", json.dumps(SAMPLE | {"image": "c.png"}), r"data\.jsonl:1: image"),
    "image is a folder": ("data.json", change(image="."), "does not exist"),
    "no image": ("data.json", change(image=None), r"1 <image> placeholder\(s\) .* 0 image"),
    "too many images": (
        "data.json",
        change(image=["a.png", "b.png"]),
        r"1 <image> placeholder\(s\) .* 2 image",
    ),
    "image without placeholder": (
        "data.json",
        json.dumps([TEXT_ONLY | {"image": "a.png"}]),
        r"record 0: 0 <image> placeholder\(s\) .* 1 image",
    ),
    "empty conversation": ("data.json", change(conversations=[]), "record 1: 'conversations' is empty"),
    "no conversation": ("data.json", '[{"id": 1}]', "record 0: no conversation"),
    "no answer": ("data.json", change(conversations=[HUMAN]), "no assistant turn"),
    "unknown speaker": (
        "data.json",
        change(conversations=[{"from": "bot", "value": "hi"}]),
        r"conversations\[0\]: the speaker is 'bot'; use one of human",
    ),
    "text is a number": ("data.json", change(conversations=[HUMAN, {"from": "gpt", "value": 3}]), "is a int"),
    "turn is a string": ("data.json", change(conversations=["hi"]), "holds a str; a turn is an object"),
    "late system turn": (
        "data.json",
        change(conversations=[HUMAN, GPT, {"from": "system", "value": ""}]),
        "a system turn stands after",
    ),
    "unknown part": (
        "data.json",
        change(conversations=[{"from": "human", "value": [{"type": "table"}]}, GPT]),
        "a content part must be",
    ),
    "image is a number": ("data.json", change(image=3), "'image' must be a file name"),
    "id is a list": ("data.json", change(id=[1]), "record 1: id is a list"),
    "record is a list": ("data.json", "[[]]", "record 0: holds a list; a record is a JSON object"),
    "no records": ("data.json", "[]", r"data\.json: holds no records"),
    "empty file": ("data.jsonl", "", r"data\.jsonl: holds no records"),
    "not text": ("data.json", b"\xff\xfe\x00", "cannot be read as UTF-8"),
}


@pytest.mark.parametrize(("name", "content", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_refused_in_one_line(name, content, message, folder):
    with pytest.raises(DataError, match=message) as caught:
        load(folder, content, name)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(str(folder / name))


def test_a_missing_file_is_named(folder):
    with pytest.raises(DataError, match=r"nowhere\.json: no such file"):
        load_records(folder / "nowhere.json")
