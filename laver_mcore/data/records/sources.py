"""A data set on disk, read record by record where it lies: JSON / JSONL, tables, tars, or prepared shards.

`scan` finds the records once and gives each a locator, a row of integers that `read` needs to find it again;
the index (`index.py`) keeps them, so that no process ever holds a whole set in memory.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from laver_mcore.data.errors import DataError, one_sample, reason
from laver_mcore.data.images.source import (
    ParquetCell,
    TarMember,
    image_cells,
    is_arrow,
    open_parquet,
    read_parquet_row,
    read_range,
    row_counts,
)
from laver_mcore.data.records.conversation import parse_record, read_turns, record_name, typed_pieces
from laver_mcore.data.records.datasets_folder import STATE, arrow_files, is_datasets_folder
from laver_mcore.data.records.finevision import RatingFilter, behind_images, finevision_turns, is_finevision
from laver_mcore.data.records.image_reference import ImageFolder
from laver_mcore.data.records.json_file import json_records
from laver_mcore.data.records.sample import Sample, Turn, make_sample, typed_turn
from laver_mcore.data.records.shards import MANIFEST, member_offsets, record_offsets
from laver_mcore.data.records.values import present
from laver_mcore.data.records.webdataset import WebDatasetSource, tar_files


class Source(Protocol):
    """Records in a fixed order. Sources are small and can be sent to a worker process."""

    name: str
    images_from: str
    """What samples depend on besides their records: where images are looked up. Empty: records bring their images."""

    def scan(self) -> Iterator[tuple[int, ...]]:
        """Yield the locator of every record, in order; DataError for a file that cannot be read."""

    def read(self, locator: Sequence[int], *, check_files: bool = False) -> Sample:
        """Read one record; its key is the record's own name, not yet unique. DataError for a bad one."""

    def fingerprint(self) -> str:
        """Hex digest that changes when the records do."""


class JsonSource:
    """LLaVA / ShareGPT JSON or JSONL; locators are (byte offset, bytes, record number)."""

    def __init__(self, path: Path, images: ImageFolder) -> None:
        self.path, self.images, self.name = path, images, path.name
        self.images_from = f"{images.path.resolve()} {images.allow_outside}"

    def scan(self) -> Iterator[tuple[int, ...]]:
        for number, (_, _, offset, size) in enumerate(json_records(self.path)):
            yield offset, size, number

    def read(self, locator: Sequence[int], *, check_files: bool = False) -> Sample:
        offset, size, number = (int(value) for value in locator)
        where = f"{self.path}: record {number}"
        try:
            record = json.loads(read_range(self.path, offset, size))
        except (OSError, ValueError) as error:
            raise DataError(f"{where}: the file has changed since it was indexed ({error})") from None
        key = record_name(record, where, default=f"{self.name}:{number}")
        return parse_record(record, key=key, images=self.images, where=where, check_files=check_files)

    def fingerprint(self) -> str:
        try:
            with self.path.open("rb") as file:
                return hashlib.file_digest(file, "blake2b").hexdigest()
        except FileNotFoundError:
            raise DataError(f"{self.path}: no such file") from None


class ParquetSource:
    """Tables (parquet, Arrow) of LLaVA-OneVision or FineVision; locators are (file, row group, row in group)."""

    images_from = ""

    def __init__(self, path: Path, ratings: RatingFilter | None = None) -> None:
        self.path, self.name, self.ratings = path, path.name, ratings
        self._state = ""
        if is_datasets_folder(path):
            self.files, self._state = arrow_files(path)
        else:
            self.files = parquet_files(path) if path.is_dir() else [path]

    def scan(self) -> Iterator[tuple[int, ...]]:
        for number, file in enumerate(self.files):
            for group, num_rows in enumerate(row_counts(file)):
                for row in range(num_rows):
                    yield number, group, row

    def read(self, locator: Sequence[int], *, check_files: bool = False) -> Sample:
        number, group, row = (int(value) for value in locator)
        return self.parse(read_parquet_row(self.files[number], group, row), number, group, row)

    def parse(self, record: dict[str, Any], number: int, group: int, row: int) -> Sample:
        """One decoded row as a sample whose images stay in the file."""
        file = self.files[number]
        where = f"{file}: row group {group}, row {row}"
        with one_sample(where):
            column = image_column(record)
            num_images = len(image_cells(record.get(column)))
            images = [ParquetCell(file, group, row, column, index) for index in range(num_images)]
            name = record_name(record, where, f"{file.stem}:{group}:{row}")
            if is_finevision(record):
                turns = finevision_turns(record, num_images, self.ratings or RatingFilter(), where)
            else:
                turns = _with_images(read_turns(record, where)[0], num_images)
            return make_sample(name, turns, images, where)

    def fingerprint(self) -> str:
        digest = hashlib.blake2b(repr(self.ratings).encode(), digest_size=16)
        for file in self.files:
            if not file.is_file():
                raise DataError(f"{file}: no such file")
            # Row groups' sizes and column statistics, read in one piece; `datasets` keeps a fingerprint of its own.
            content = (
                self._state or row_counts(file) if is_arrow(file) else open_parquet(file).metadata.to_dict()
            )
            digest.update(f"{file.name} {file.stat().st_size} {content}".encode())
        return digest.hexdigest()


def image_column(record: dict[str, Any]) -> str:
    """The column that holds a row's images."""
    return "images" if present(record, "images") is not None else "image"


def _with_images(turns: tuple[Turn, ...], num_images: int) -> tuple[Turn, ...]:
    """The turns, images in front of the first question where no turn says where they belong."""
    if any(turn.num_images for turn in turns) or not num_images:
        return turns
    first = next((n for n, turn in enumerate(turns) if turn.role == "user"), None)
    if first is None:
        return turns
    question = typed_turn("user", behind_images(num_images, turns[first].text))
    return (*turns[:first], question, *turns[first + 1 :])


class ShardSource:
    """Tar shards written by laver prepare; locators are (shard, record's offset, record's bytes)."""

    images_from = ""

    def __init__(self, path: Path) -> None:
        self.path, self.name = path, path.name
        self._manifest_bytes = (path / MANIFEST).read_bytes()
        manifest = json.loads(self._manifest_bytes)
        self.shards = [path / shard["name"] for shard in manifest["shards"]]

    def scan(self) -> Iterator[tuple[int, ...]]:
        for number, shard in enumerate(self.shards):
            for offset, size in record_offsets(shard):
                yield number, offset, size

    def read(self, locator: Sequence[int], *, check_files: bool = False) -> Sample:
        number, offset, size = (int(value) for value in locator)
        shard = self.shards[number]
        where = f"{shard} at byte {offset}"
        try:
            record = json.loads(read_range(shard, offset, size))
            starts = member_offsets(offset, size, [image["size"] for image in record["images"]])
            images = [
                TarMember(shard, start, image["size"], image["width"], image["height"])
                for start, image in zip(starts, record["images"], strict=True)
            ]
            turns = tuple(
                typed_turn(turn["role"], typed_pieces(turn["content"], where)) for turn in record["turns"]
            )
            return make_sample(record["key"], turns, images, where)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{where}: not a prepared record ({reason(error)}); run prepare_data.py --check"
            ) from None

    def fingerprint(self) -> str:
        return hashlib.blake2b(self._manifest_bytes, digest_size=16).hexdigest()


def open_source(
    path: str | Path,
    image_folder: str | Path,
    ratings: RatingFilter | None = None,
    *,
    allow_outside_images: bool = False,
) -> Source:
    """The source at `path`, told by looking: prepared shards, tables, WebDataset tars, or JSON / JSONL."""
    path = Path(path)
    if (path / MANIFEST).is_file():
        return ShardSource(path)
    if is_table(path):
        return ParquetSource(path, ratings)
    if path.suffix.lower() == ".tar" or (path.is_dir() and tar_files(path)):
        return WebDatasetSource(path)
    if path.is_dir():
        raise DataError(
            f"{path}: holds neither {MANIFEST}, {STATE} of datasets, *.parquet nor *.tar; give a prepared set, a "
            "table, tars or JSON"
        )
    return JsonSource(path, ImageFolder(Path(image_folder), allow_outside_images))


def is_table(path: Path) -> bool:
    """Whether a path is parquet or Arrow: a file, a folder of parquet files, or one of `datasets`."""
    if path.is_dir():
        return is_datasets_folder(path) or bool(parquet_files(path))
    return path.suffix.lower() in (".parquet", ".arrow")


def parquet_files(folder: Path) -> list[Path]:
    """The parquet files in and below a folder, whatever the case of their suffix."""
    return sorted(file for file in folder.rglob("*") if file.suffix.lower() == ".parquet")
