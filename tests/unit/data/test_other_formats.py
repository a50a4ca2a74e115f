"""Tars that others made, Energon's folders and those of `datasets`: told by looking, read or refused by name."""

import gzip
import io
import json
import re
import tarfile

import pytest
from corpora import encode, picture

from laver_mcore.cli import prepare
from laver_mcore.data.errors import DataError
from laver_mcore.data.images.decode import open_image
from laver_mcore.data.images.source import read_image_bytes
from laver_mcore.data.order.index import get_index
from laver_mcore.data.records.sources import open_source

JPEG, PNG = encode(picture()), encode(picture(seed=1), "PNG")
TURNS = [{"from": "human", "value": "<image>\nWhich?"}, {"from": "gpt", "value": "1."}]
TWO = [{"from": "human", "value": "<image>\nand <image>"}, {"from": "gpt", "value": "2."}]
BARE = [{"from": "human", "value": "Which?"}, {"from": "gpt", "value": "1."}]
WHICH = (["<image>\nWhich?", "1."], [JPEG])


def dump(value):
    return json.dumps(value).encode()


# The members of one sample -> (texts of its turns, bytes of its images), or words of the line that refuses it.
SAMPLES = {
    "img2dataset": (
        {"jpg": JPEG, "json": dump({"caption": "old", "url": "http://x/y.jpg"}), "txt": b" a cat \n"},
        (["<image>", "a cat"], [JPEG]),
    ),
    "caption in the json": ({"json": dump({"caption": "a cat"}), "png": PNG}, (["<image>", "a cat"], [PNG])),
    "LLaVA record": ({"json": dump({"image": "x/a.jpg", "conversations": TURNS}), "jpg": JPEG}, WHICH),
    "record without a name": ({"json": dump({"conversations": TURNS}), "JPG": JPEG}, WHICH),
    "no place for the image": ({"json": dump({"conversations": BARE}), "jpg": JPEG}, WHICH),
    "two images in the tar's order": (
        {"json": dump({"conversations": TWO}), "0.jpg": JPEG, "1.png": PNG},
        (["<image>\nand <image>", "2."], [JPEG, PNG]),
    ),
    "two images by their names": (
        {"json": dump({"conversations": TWO, "images": ["1.png", "0.jpg"]}), "0.jpg": JPEG, "1.png": PNG},
        (["<image>\nand <image>", "2."], [PNG, JPEG]),
    ),
    "OpenAI messages": (
        {
            "json": dump(
                {
                    "messages": [
                        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Which?"}]},
                        {"role": "assistant", "content": "1."},
                    ]
                }
            ),
            "jpg": JPEG,
        },
        (["<image>Which?", "1."], [JPEG]),
    ),
    "text alone": ({"json": dump({"conversations": BARE})}, (["Which?", "1."], [])),
    "image alone": ({"jpg": JPEG}, "wanted images beside a json"),
    "caption alone": ({"txt": b"a cat"}, "wanted images beside a json"),
    "more images than places": (
        {"json": dump({"conversations": TURNS}), "0.jpg": JPEG, "1.jpg": JPEG},
        r"1 <image> placeholder\(s\) in the user turns but 2 image",
    ),
    "a video": ({"mp4": b"x", "txt": b"a cat"}, "video is not read"),
    "a sound": ({"jpg": JPEG, "flac": b"x", "txt": b"a cat"}, "audio is not read"),
    "broken json": ({"jpg": JPEG, "json": b"{"}, "JSONDecodeError"),
    "a list": ({"jpg": JPEG, "json": b"[]"}, "holds a list; a record is a JSON object"),
    "text of another encoding": ({"jpg": JPEG, "txt": "é".encode("latin-1")}, "UnicodeDecodeError"),
    "half a surrogate pair": ({"jpg": JPEG, "json": b'{"caption": "\\ud83d"}'}, "half of a surrogate pair"),
    "no image": ({"jpg": b"<html>", "txt": b"a cat"}, "cannot be decoded|not an image"),
}
GOOD = {"jpg": JPEG, "txt": b"good"}


def write_tar(path, samples, **options):
    with tarfile.open(path, "w", **options) as archive:
        for key, members in samples.items():
            for extension, data in members.items():
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    return path


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("name", SAMPLES)
def test_samples_of_tars(name, form, tmp_path, hugging_face):
    members, want = SAMPLES[name]
    long = "a/" + "b" * 90 + "/000001"  # beside GNU's and PAX's own records of long names
    path = write_tar(tmp_path / "x.tar", {"000000": GOOD, long: members, "000002": GOOD}, format=form)
    index = get_index(open_source(path, tmp_path), hugging_face, "")
    assert index.sample(0).turns[1].text == index.sample(len(index) - 1).turns[1].text == "good"
    if isinstance(want, str):
        ((_, why, kind),) = index.bad
        assert re.search(want, why) and "\n" not in why
        assert kind == {"a video": "video", "a sound": "audio", "no image": "image"}.get(name, "record")
        return
    assert not index.bad
    sample = index.sample(1)
    assert sample.key == long
    assert ([turn.text for turn in sample.turns], [read_image_bytes(i) for i in sample.images]) == want
    assert index.image_sizes[index.image_starts[1] : index.image_starts[2]].tolist() == [
        list(open_image(image).size) for image in sample.images
    ]


def test_what_webdataset_writes_is_what_it_reads(tmp_path):
    wds = pytest.importorskip("webdataset")
    for shard in range(2):
        with wds.TarWriter(str(tmp_path / f"{shard}.tar")) as writer:
            for number in range(3):
                writer.write(
                    {"__key__": f"s{shard}{number}", "jpg": JPEG, "txt": f"caption {shard} {number}"}
                )
    source = open_source(tmp_path, tmp_path)
    ours = [source.read(locator) for locator in source.scan()]
    urls = [str(tmp_path / f"{shard}.tar") for shard in range(2)]
    theirs = list(wds.WebDataset(urls, shardshuffle=False))
    assert [sample.key for sample in ours] == [sample["__key__"] for sample in theirs]
    assert [sample.turns[1].text.encode() for sample in ours] == [sample["txt"] for sample in theirs]
    assert [read_image_bytes(sample.images[0]) for sample in ours] == [sample["jpg"] for sample in theirs]


SPLIT = "split_parts:\n  train:\n  - a.tar\n  val:\n  - b.tar\n"
# Files of a folder -> number of samples, or words of the line that refuses it.
FOLDERS = {
    "tars": (None, 2),
    "Energon's train split": (SPLIT, 1),
    "a tar that is gone": (SPLIT.replace("a.tar", "c.tar"), "c.tar is no file of the folder"),
    "a tar elsewhere": (SPLIT.replace("a.tar", "../a.tar"), "is no file of the folder"),
    "no split": ("split_parts: {}", "names no tars under split_parts, train"),
    "no YAML": ("{", "names no tars under split_parts, train"),
}


@pytest.mark.parametrize(("split", "want"), FOLDERS.values(), ids=FOLDERS)
def test_folders_of_tars(split, want, tmp_path):
    folder = tmp_path / "set"
    (folder / ".nv-meta").mkdir(parents=True)
    write_tar(folder / "a.tar", {"x": GOOD})
    write_tar(folder / "b.tar", {"y": GOOD})
    if split is not None:
        (folder / ".nv-meta" / "split.yaml").write_text(split)
    if isinstance(want, int):
        assert len(list(open_source(folder, folder).scan())) == want
    else:
        with pytest.raises(DataError, match=want):
            open_source(folder, folder)


# How a good tar is damaged -> words of the line.
DAMAGE = {
    "a header in the middle": (
        lambda data, at: data[:at] + b"\xff" * 512 + data[at + 512 :],
        "no member at byte",
    ),
    "cut in a header": (lambda data, at: data[: at + 100], "no member at byte"),
    "cut between two members": (lambda data, at: data[:at], "no member at byte"),
    "cut in a member": (lambda data, at: data[: at - 600], "no plain tar, or a damaged one"),
    "compressed": (lambda data, at: gzip.compress(data), "unpack a compressed one"),
    "no tar": (lambda data, at: b"<html>" * 200, "no plain tar"),
    "empty": (lambda data, at: b"", "no plain tar"),
}


@pytest.mark.parametrize(("change", "words"), DAMAGE.values(), ids=DAMAGE)
def test_damaged_tars(change, words, tmp_path, hugging_face):
    path = write_tar(tmp_path / "x.tar", {str(n): GOOD for n in range(4)})
    with tarfile.open(path) as archive:
        at = archive.getmembers()[4].offset
    path.write_bytes(change(path.read_bytes(), at))
    with pytest.raises(DataError, match=words):
        get_index(open_source(path, tmp_path), hugging_face, "")


def test_a_tar_of_another_content_has_another_fingerprint(tmp_path):
    path = write_tar(tmp_path / "x.tar", {"a": GOOD})
    before = open_source(path, tmp_path).fingerprint()
    assert open_source(path, tmp_path).fingerprint() == before
    write_tar(path, {"a": GOOD | {"txt": b"good day"}})
    assert open_source(path, tmp_path).fingerprint() != before


def write_datasets(folder, rows, batch=2, **state):
    """As `Dataset.save_to_disk` of Hugging Face's `datasets` writes it: Arrow streams and their names."""
    pyarrow = pytest.importorskip("pyarrow")
    folder.mkdir(parents=True)
    table = pyarrow.Table.from_pylist(rows)
    files = []
    for number, start in enumerate(range(0, len(rows), 4)):
        name = f"data-{number:05d}.arrow"
        part = table.slice(start, 4)
        with (
            pyarrow.OSFile(str(folder / name), "wb") as file,
            pyarrow.ipc.new_stream(file, table.schema) as stream,
        ):
            stream.write_table(part, max_chunksize=batch)
        files.append({"filename": name})
    content = {"_data_files": files, "_fingerprint": "0f", "_indices_files": None} | state
    (folder / "state.json").write_text(json.dumps(content))
    return folder


ROWS = [{"id": str(n), "image": {"bytes": JPEG, "path": None}, "conversations": TURNS} for n in range(7)]


@pytest.mark.parametrize("split", [False, True])
def test_folders_of_datasets(split, tmp_path, hugging_face):
    folder = tmp_path / "set"
    write_datasets(folder / "train" if split else folder, ROWS)
    if split:
        (folder / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    index = get_index(open_source(folder, folder), hugging_face, "")
    assert [index.key(n) for n in range(len(index))] == [str(n) for n in range(7)]
    sample = index.sample(6)
    assert ([turn.text for turn in sample.turns], [read_image_bytes(i) for i in sample.images]) == WHICH


# What is wrong with a folder -> words of the line.
BAD_FOLDERS = {
    "chosen rows": ({"_indices_files": [{"filename": "i.arrow"}]}, r"after flatten_indices\(\)"),
    "a file that is gone": ({"_data_files": [{"filename": "x.arrow"}]}, "x.arrow is no file of the folder"),
    "a file elsewhere": ({"_data_files": [{"filename": "../x.arrow"}]}, "x.arrow is no file of the folder"),
    "no files": ({"_data_files": None}, "names no files"),
    "an empty list": ({"_data_files": []}, "nothing is no file"),
}


@pytest.mark.parametrize(("state", "words"), BAD_FOLDERS.values(), ids=BAD_FOLDERS)
def test_bad_folders_of_datasets(state, words, tmp_path):
    with pytest.raises(DataError, match=words):
        open_source(write_datasets(tmp_path / "set", ROWS, **state), tmp_path)


def test_a_damaged_arrow_file_is_named(tmp_path):
    folder = write_datasets(tmp_path / "set", ROWS)
    (folder / "data-00000.arrow").write_bytes(b"<html>" * 20)
    with pytest.raises(DataError, match=r"data-00000\.arrow: not an Arrow stream"):
        list(open_source(folder, folder).scan())


def test_a_set_without_a_train_split_names_what_it_has(tmp_path):
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["test"]}')
    with pytest.raises(DataError, match=r"no split 'train' but \['test'\]"):
        open_source(tmp_path, tmp_path)


@pytest.mark.parametrize("form", ["webdataset", "llava-onevision"])
def test_both_can_be_prepared(form, tmp_path, capsys):
    if form == "webdataset":
        given = write_tar(tmp_path / "x.tar", {str(n): GOOD for n in range(7)})
    else:
        given = write_datasets(tmp_path / "set", ROWS)
    arguments = [
        "--input",
        given,
        "--format",
        form,
        "--output",
        tmp_path / "out",
        "--workers",
        "1",
        "--check",
    ]
    assert prepare.main(list(map(str, arguments))) == 0
    assert "7 samples with 7 images" in capsys.readouterr().out
    prepared = open_source(tmp_path / "out", tmp_path)
    assert all(read_image_bytes(prepared.read(locator).images[0]) == JPEG for locator in prepared.scan())
