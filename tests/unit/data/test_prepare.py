"""Preparation: what goes into a shard, restart, rejects, checking, and other readers."""

import importlib.util
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from corpora import (
    encode,
    hard_pictures,
    picture,
    rotated,
    sixteen_bits,
    write_finevision,
    write_llava,
    write_onevision,
)
from PIL import Image, ImageOps

from laver_mcore.data.errors import DataError
from laver_mcore.data.images.decode import decode_image, open_image
from laver_mcore.data.prepare.check import check_prepared
from laver_mcore.data.prepare.convert import ConvertOptions, convert, open_corpus
from laver_mcore.data.prepare.transcode import ImageLimits, prepare_image
from laver_mcore.data.records.finevision import RatingFilter
from laver_mcore.data.records.shards import record_offsets
from laver_mcore.data.records.sources import open_source

ROOT = Path(__file__).parents[3]
LLAVA = ConvertOptions(format="llava", samples_per_shard=6)


def prepare(path, output, options=LLAVA, **changes):
    return convert(open_corpus(path, None, options), output, options, **{"num_workers": 1} | changes)


def read_all(folder):
    source = open_source(folder, folder)
    return {sample.key: sample for sample in map(source.read, source.scan())}


KEPT = [
    "rgb.jpg",
    "progressive.jpg",
    "cmyk.jpg",
    "grey.jpg",
    "rgb.png",
    "palette.png",
    "alpha.png",
    "tall.jpg",
]
CHANGED = {"exif.jpg": "jpg", "sixteen.png": "png", "gif.gif": "png", "webp.webp": "jpg"}


@pytest.mark.parametrize("name", KEPT)
def test_original_bytes_are_kept_where_all_readers_agree(name):
    data = hard_pictures()[name]
    assert prepare_image(data, ImageLimits(), name).data == data


@pytest.mark.parametrize(("name", "extension"), CHANGED.items())
def test_what_readers_disagree_about_is_written_anew(name, extension):
    data = hard_pictures()[name]
    prepared = prepare_image(data, ImageLimits(), name)
    assert (prepared.extension, prepared.data != data) == (extension, True)
    ours = decode_image(prepared.data, name)
    assert ours.size == (prepared.width, prepared.height)
    with Image.open(io.BytesIO(data)) as image:
        expected = np.asarray(decode_image(data, name))
        if name == "exif.jpg":
            assert ours.size == (image.height, image.width)
            expected = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    error = np.abs(np.asarray(ours).astype(int) - expected.astype(int))
    assert error.mean() < (0.01 if extension == "png" else 4)


def test_sixteen_bits_become_eight():
    grey = np.asarray(decode_image(sixteen_bits(), "x"))[..., 0]
    assert grey.min() == 0
    assert grey.max() == 255
    assert np.abs(np.diff(np.sort(grey.ravel()).astype(int))).max() == 1  # no clipping


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (encode(picture())[:400], "cannot be decoded"),
        (b"", "cannot be decoded"),
        (b"<html>404</html>", "cannot be decoded"),
        (encode(picture(300, 1)), "beyond an aspect ratio of 200"),
    ],
    ids=["truncated", "empty", "html", "extreme"],
)
def test_rejected_images(data, message):
    with pytest.raises(DataError, match=message):
        prepare_image(data, ImageLimits(), "x")


def test_large_images_are_scaled_down():
    prepared = prepare_image(encode(picture(90, 60)), ImageLimits(max_pixels=600), "x")
    assert (prepared.width, prepared.height) == (30, 20)


def test_llava_becomes_shards_with_the_same_content(tmp_path):
    path = write_llava(tmp_path, hard_pictures() | {"broken.jpg": encode(picture())[:300]})
    manifest = prepare(path, tmp_path / "out")
    assert manifest["num_samples"] == len(hard_pictures()) + 2
    assert [shard["num_samples"] for shard in manifest["shards"]] != [6, 6, 6]  # one rejected
    (reject,) = map(json.loads, (tmp_path / "out" / "rejects.jsonl").read_text().splitlines())
    assert "broken.jpg: cannot be decoded" in reject["reason"]
    prepared = read_all(tmp_path / "out")
    source = open_source(path, tmp_path)
    original = {sample.key: sample for sample in map(source.read, source.scan())}
    assert original.keys() - prepared.keys() == {f"s{len(hard_pictures())}"}
    for key, sample in prepared.items():
        assert sample.turns == original[key].turns
        for ours, theirs in zip(sample.images, original[key].images, strict=True):
            assert open_image(ours).size == (ours.width, ours.height)
            if theirs.name in KEPT:
                assert open_image(ours).tobytes() == open_image(theirs).tobytes()
    keys = [
        json.loads(record)["key"]
        for shard in sorted((tmp_path / "out").glob("*.tar"))
        for record in records_of(shard)
    ]
    assert keys != sorted(keys, key=lambda key: (key[0], int(key[1:]))), "shuffled once"


def records_of(shard):
    data = shard.read_bytes()
    return [data[offset : offset + size] for offset, size in record_offsets(shard)]


@pytest.mark.parametrize("form", ["llava-onevision", "finevision"])
def test_parquet_becomes_shards_with_the_same_content(form, tmp_path):
    pytest.importorskip("pyarrow")
    write = write_onevision if form == "llava-onevision" else write_finevision
    (tmp_path / "in").mkdir()
    for number in range(2):
        write(tmp_path / "in" / f"{number}.parquet")
    ratings = RatingFilter(relevance=3) if form == "finevision" else RatingFilter()
    options = ConvertOptions(format=form, samples_per_shard=5, ratings=ratings)
    manifest = prepare(tmp_path / "in", tmp_path / "out", options)
    source = open_source(tmp_path / "in", tmp_path, ratings)
    originals = [source.read(locator) for locator in source.scan()]
    assert manifest["num_samples"] == len(originals)
    shards = open_source(tmp_path / "out", tmp_path)
    prepared = sorted(
        (shards.read(locator) for locator in shards.scan()), key=lambda s: (s.turns[1].text, s.key)
    )
    originals.sort(key=lambda s: (s.turns[1].text, s.key))
    assert [sample.turns for sample in prepared] == [sample.turns for sample in originals]
    for ours, theirs in zip(prepared, originals, strict=True):
        assert [open_image(i).tobytes() for i in ours.images] == [
            open_image(i).tobytes() for i in theirs.images
        ]
    if form == "finevision":
        records = [json.loads(r) for s in sorted((tmp_path / "out").glob("*.tar")) for r in records_of(s)]
        assert all(len(r["ratings"]) == len(r["turns"]) // 2 for r in records)
        assert min(rating["relevance"] for r in records for rating in r["ratings"]) == 3
        assert {r["source"] for r in records} == {"docvqa"}


def test_the_same_set_gives_the_same_bytes_with_any_number_of_workers(tmp_path):
    path = write_llava(tmp_path, {f"{n}.jpg": encode(picture(seed=n)) for n in range(16)})
    one, two = prepare(path, tmp_path / "one"), prepare(path, tmp_path / "two", num_workers=2)
    assert one == two
    other = prepare(path, tmp_path / "other", ConvertOptions(format="llava", samples_per_shard=6, seed=1))
    assert other["shards"] != one["shards"]


def test_other_options_are_refused_in_the_same_folder(tmp_path):
    path = write_llava(tmp_path, {"a.jpg": encode(picture())})
    prepare(path, tmp_path / "out")
    assert prepare(path, tmp_path / "out")["num_samples"] == 3  # again: nothing to do
    with pytest.raises(DataError, match="holds a conversion of other data or options"):
        prepare(path, tmp_path / "out", ConvertOptions(format="llava", seed=1))


def run_tool(*arguments, **options):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    command = [sys.executable, str(ROOT / "tools" / "prepare_data.py"), *map(str, arguments)]
    return subprocess.Popen(command, env=environment, text=True, **options)


def test_killed_in_the_middle_it_ends_with_the_same_manifest(tmp_path):
    data = encode(picture(900, 700))
    path = write_llava(tmp_path, {f"{n}.jpg": data for n in range(120)})
    arguments = ["--input", path, "--format", "llava", "--samples-per-shard", 4, "--workers", 1]
    whole = run_tool(*arguments, "--output", tmp_path / "whole")
    killed = run_tool(*arguments, "--output", tmp_path / "killed", stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while len(list((tmp_path / "killed").glob("*.tar"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.005)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert not (tmp_path / "killed" / "manifest.json").exists()
    done = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "killed" / ".prepare").glob("*.json")}
    assert done
    again = run_tool(*arguments, "--output", tmp_path / "killed", "--check", stdout=subprocess.PIPE)
    report, _ = again.communicate()
    assert whole.wait() == again.returncode == 0
    assert "in order" in report
    assert all((tmp_path / "killed" / ".prepare" / n).stat().st_mtime_ns == t for n, t in done.items())
    first, second = ((tmp_path / name / "manifest.json").read_bytes() for name in ("whole", "killed"))
    assert first == second


def test_check_names_what_is_wrong(tmp_path):
    path = write_llava(tmp_path, {f"{n}.jpg": encode(picture(seed=n)) for n in range(8)})
    out = tmp_path / "out"
    prepare(path, out)
    assert check_prepared(out) == []
    shard = out / "shard-000001.tar"
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    assert [line for line in check_prepared(out) if "shard-000001.tar: its hash" in line]
    (out / "manifest.json").unlink()
    assert "no manifest" in check_prepared(out)[0]


def test_webdataset_reads_the_shards(tmp_path):
    webdataset = pytest.importorskip("webdataset")
    path = write_llava(tmp_path, {f"{n}.jpg": rotated(1, seed=n) for n in range(5)})
    prepare(path, tmp_path / "out")
    shards = sorted(map(str, (tmp_path / "out").glob("*.tar")))
    found = list(webdataset.WebDataset(shards, shardshuffle=False).decode("pil"))
    assert len(found) == 7
    assert sorted(sample["json"]["key"] for sample in found) == ["s0", "s1", "s2", "s3", "s4", "t0", "t1"]
    assert sum("0.jpg" in sample for sample in found) == 5


@pytest.mark.skipif(importlib.util.find_spec("megatron.energon") is None, reason="Energon is not installed")
def test_energon_reads_the_shards(tmp_path):
    from megatron import energon

    path = write_llava(tmp_path, {f"{n}.jpg": encode(picture(seed=n)) for n in range(9)})
    prepare(path, tmp_path / "out")

    @energon.stateless
    def cook(sample):
        return sample

    class Encoder(energon.DefaultTaskEncoder):
        cookers = (energon.Cooker(cook),)

        @energon.stateless
        def encode_sample(self, sample):
            return sample

    worker = energon.WorkerConfig(rank=0, world_size=1, num_workers=0)
    dataset = energon.get_train_dataset(
        str(tmp_path / "out"),
        worker_config=worker,
        batch_size=None,
        shuffle_buffer_size=None,
        max_samples_per_sequence=None,
        task_encoder=Encoder(),
        repeat=False,
    )
    keys = sorted(sample["json"]["key"] for sample in energon.get_loader(dataset))
    assert keys == sorted([f"s{n}" for n in range(9)] + ["t0", "t1"])
