"""Each reader of what people bring, as a function of a folder that gives a function of one draw.

`Refused` errors are what the command line makes one line of; anything else that comes out is a fault.
"""

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import yaml
from fuzz.mutations import ODD, bytes_of, text_of, value_of
from PIL import Image

from laver_mcore.config.errors import ConfigError
from laver_mcore.config.load import from_recipe, parse, resolve
from laver_mcore.data.errors import DataError
from laver_mcore.data.images import dali
from laver_mcore.data.images.backends import BACKENDS, make_backend
from laver_mcore.data.images.decode import open_image
from laver_mcore.data.images.native import NativeImageProcessor
from laver_mcore.data.images.processors import FixedImageProcessor
from laver_mcore.data.images.source import LoadedImage
from laver_mcore.data.images.wanted import WantedImage
from laver_mcore.data.records.sources import open_source

REFUSED = (DataError, ConfigError)
Draw = Callable[[Random], None]
TURNS = [{"from": "human", "value": "<image>\nred?"}, {"from": "gpt", "value": "blue"}]
RECORD = {"id": "a", "image": "a.png", "conversations": TURNS}
TYPED = {"messages": [{"role": "user", "content": [{"type": "text", "text": "red?"},
         {"type": "image_url", "image_url": {"url": "a.png"}}]}, {"role": "assistant", "content": "blue"}]}  # fmt: skip
BAD_MARKS: list[dict[str, Any]] = [
    {"video": "a.mp4"},
    {"audio": "a.wav"},
    {"id": "\ud800"},
    {"conversations": [{"from": "human", "value": "x"}, {"from": "gpt", "value": "\udfff"}], "image": None},
    {"image": ["a.png", "a.png", "a.png"]},
    {"image": "../a.png"},
    {"image": "http://example.org/a.png"},
]
"""What no reader may let pass, whatever else stands in a record that is right."""


def png(size: tuple[int, int] = (12, 8)) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def read_all(path: Path) -> tuple[int, int]:
    """(good, refused) records of a file, each with its images decoded; a fault of the whole file is one refusal."""
    good = bad = 0
    try:
        source = open_source(path, path.parent)
        for locator in source.scan():
            try:
                for image in source.read(locator, check_files=True).images:
                    open_image(image)
                good += 1
            except REFUSED as error:
                one_line(error)
                bad += 1
    except REFUSED as error:
        one_line(error)
        bad += 1
    return good, bad


def one_line(error: Exception) -> None:
    assert "\n" not in str(error), str(error)
    assert str(error).strip()
    str(error).encode()  # can be printed and written


def json_records(folder: Path) -> Draw:
    (folder / "a.png").write_bytes(png())

    def draw(random: Random) -> None:
        path = folder / f"{random.getrandbits(64)}.{random.choice(('json', 'jsonl'))}"
        if random.random() < 0.2:
            path.write_text(json.dumps([RECORD | random.choice(BAD_MARKS)]) + "\n")
            assert read_all(path) == (0, 1), path.read_text()
            return
        records = [value_of(random, random.choice((RECORD, TYPED))) for _ in range(3)]
        if path.suffix == ".json":
            path.write_bytes(text_of(random, records))
        else:
            path.write_bytes(b"\n".join(text_of(random, record) for record in records))
        read_all(path)

    return draw


def parquet(folder: Path) -> Draw:
    return _tables(folder, "parquet")


def arrow(folder: Path) -> Draw:
    return _tables(folder, "arrow")


def _tables(folder: Path, kind: str) -> Draw:
    pyarrow = pytest.importorskip("pyarrow")
    tables = pytest.importorskip("pyarrow.parquet")

    row = {"id": "a", "image": {"bytes": png(), "path": "a.png"}, "conversations": TURNS}

    def draw(random: Random) -> None:
        rows = [{**row} for _ in range(2)]
        name = random.choice(("id", "image", "conversations", "texts", "images", "none"))
        column = [random.choice((row.get(name), *ODD[:20])) for _ in rows]
        path = folder / f"{random.getrandbits(64)}.{kind}"  # readers keep open what they have read
        try:
            columns = {key: [r[key] for r in rows] for key in row} | {name: column}
            table = pyarrow.table(columns)
        except (pyarrow.ArrowException, ValueError, TypeError, OverflowError):
            table = pyarrow.Table.from_pylist(rows)  # what no table can hold
        if kind == "parquet":
            tables.write_table(table, path)
        else:
            with pyarrow.ipc.new_stream(str(path), table.schema) as writer:
                writer.write_table(table)
        if random.random() < 0.5:
            path.write_bytes(bytes_of(random, path.read_bytes()))
        read_all(path)
        path.unlink()

    return draw


def webdataset(folder: Path) -> Draw:
    def draw(random: Random) -> None:
        file = io.BytesIO()
        with tarfile.open(fileobj=file, mode="w") as archive:
            members = {"0.jpg": png(), "0.json": text_of(random, {"conversations": TURNS}), "1.png": png(),
                       "1.txt": bytes_of(random, b"a caption")}  # fmt: skip
            for name, data in members.items():
                info = tarfile.TarInfo(
                    name if random.random() < 0.9 else random.choice(("0", "x/0.jpg", ".json"))
                )
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
        data = file.getvalue()
        path = folder / f"{random.getrandbits(64)}.tar"
        path.write_bytes(bytes_of(random, data) if random.random() < 0.5 else data)
        read_all(path)
        path.unlink()

    return draw


def images(folder: Path) -> Draw:
    """A damaged image is refused or decoded, by every backend alike and to the reference's pixels."""
    processor = FixedImageProcessor(PROCESSOR, patch_size=8)
    names = [name for name in BACKENDS if dali.installed() or not name.startswith("dali")]
    backends = {name: make_backend(name, processor) for name in names}
    picture = Image.open(io.BytesIO(png((40, 24))))
    formats: list[bytes] = []
    progressive = {"progressive": True}
    for kind, settings in (
        ("JPEG", {}),
        ("JPEG", progressive),
        *((k, {}) for k in ("PNG", "GIF", "WEBP", "TIFF", "BMP")),
    ):
        file = io.BytesIO()
        picture.save(file, kind, **settings)
        formats.append(file.getvalue())

    def draw(random: Random) -> None:
        wanted = WantedImage(LoadedImage("an image", bytes_of(random, random.choice(formats))), 40, 24)
        failed, found = {}, {}
        for name, backend in backends.items():
            found[name], failures = backend([wanted])
            assert found[name].shape == (1, 3, 32, 32)
            assert found[name].isfinite().all()
            assert all("\n" not in failure for failure in failures.values())
            failed[name] = bool(failures)
        assert len(set(failed.values())) == 1, failed
        for name, pixels in found.items():  # filters differ at edges; other colours differ everywhere
            assert (pixels - found["pillow"]).abs().mean() < 3 / 127.5, name

    return draw


PROCESSOR = {"image_processor_type": "SiglipImageProcessor", "size": {"height": 32, "width": 32}, "resample": 3,
             "do_resize": True, "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True,
             "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}  # fmt: skip
NATIVE = PROCESSOR | {"image_processor_type": "Qwen2VLImageProcessor", "patch_size": 4, "merge_size": 2,
                      "temporal_patch_size": 2, "size": {"shortest_edge": 64, "longest_edge": 4096}}  # fmt: skip


def preprocessor_config(folder: Path) -> Draw:
    file, picture = folder / "preprocessor_config.json", Image.open(io.BytesIO(png()))

    def draw(random: Random) -> None:
        native = random.random() < 0.5
        file.write_bytes(text_of(random, NATIVE if native else PROCESSOR))
        try:
            made = NativeImageProcessor(folder) if native else FixedImageProcessor(folder, patch_size=8)
            settings = made.settings
            if (
                max(settings.height, settings.width, *(settings.crop or (0,))) > 4096
                or settings.factor > 4096
            ):
                return  # sizes that make sense, and more pixels than a fuzzer has time for
            if settings.min_pixels <= 2**24 and settings.max_pixels >= 1:
                assert made([picture]).isfinite().all()
        except REFUSED as error:
            one_line(error)

    return draw


def recipe_file(folder: Path) -> Draw:
    recipes = sorted((Path(__file__).parents[2] / "examples").rglob("*.yaml"))
    contents = [
        c
        for c in map(yaml.safe_load, (r.read_text() for r in recipes if "eval" not in r.parts))
        if isinstance(c, dict)
    ]

    def draw(random: Random) -> None:
        text = yaml.safe_dump(value_of(random, random.choice(contents))).encode("utf-8", "surrogatepass")
        (folder / "r.yaml").write_bytes(bytes_of(random, text) if random.random() < 0.3 else text)
        try:
            resolve(from_recipe(folder / "r.yaml"))
        except REFUSED as error:
            one_line(error)

    return draw


def flags(folder: Path) -> Draw:
    known = "--lr --seed --model --vision --seq-length --mask-ratio --data-path --tokenizer-model --save --objective"
    known += " --num-layers --hidden-size --global-batch-size --context-parallel-size --momentum --lora-rank --bf16"
    values = "1 0 -1 0.5 nan inf 1e400 x true None [] {} é 99999999999999999999 -- --lr laver tiny"

    def draw(random: Random) -> None:
        argv = [random.choice((*known.split(), *values.split(), "")) for _ in range(random.randrange(1, 7))]
        try:
            parse(argv)
        except REFUSED as error:
            one_line(error)
        except SystemExit as left:  # argparse's own line, or --help
            if left.code not in (0, 2):
                raise AssertionError(argv) from None

    return draw
