"""WebDataset tars as others make them (img2dataset, webdataset's writers, Megatron Energon's folders).

Members whose names agree up to the first dot of the last part are a sample: its images, and `json` (a record in any
form, or `caption`) or `txt` (a caption). Nothing of a tar is unpacked, and no code of an Energon folder is run.
"""

import hashlib
import json
import os
import tarfile
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from laver_mcore.data.errors import DataError, one_sample, reason, shortened
from laver_mcore.data.images.source import TarMember, read_range
from laver_mcore.data.records.conversation import image_references, read_turns, record_name
from laver_mcore.data.records.finevision import behind_images
from laver_mcore.data.records.sample import Sample, Turn, make_sample, typed_turn
from laver_mcore.data.records.values import present

ENERGON = ".nv-meta"
IMAGES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "avif", "ppm")
_TEXTS = ("txt", "text", "caption")
_UNREAD = {"mp4": "video", "avi": "video", "mov": "video", "mkv": "video", "webm": "video"} | {
    "wav": "audio",
    "mp3": "audio",
    "flac": "audio",
    "ogg": "audio",
}


class _Member(NamedTuple):
    name: str
    header: int  # where its header begins, in bytes of the tar
    start: int  # where its content begins
    size: int
    checksum: int  # of its header

    @property
    def key(self) -> str:
        folder, _, name = self.name.rpartition("/")
        return f"{folder}/{name.partition('.')[0]}"

    @property
    def extension(self) -> str:
        """All behind the first dot, in lower case: `jpg`, `0.jpg`."""
        return self.name.rpartition("/")[2].partition(".")[2].lower()

    @property
    def kind(self) -> str:
        return self.extension.rpartition(".")[2]


class WebDatasetSource:
    """A tar of samples, or a folder of them; locators are (tar, first byte, byte behind the last)."""

    images_from = ""

    def __init__(self, path: Path) -> None:
        self.path, self.name = path, path.name
        self.shards = tar_files(path) if path.is_dir() else [path]

    def scan(self) -> Iterator[tuple[int, ...]]:
        for number, shard in enumerate(self.shards):
            for _, group in groupby(_members(shard), key=lambda member: member.key):
                members = list(group)
                yield number, members[0].header, members[-1].start + members[-1].size

    def read(self, locator: Sequence[int], *, check_files: bool = False) -> Sample:
        number, begin, end = (int(value) for value in locator)
        shard = self.shards[number]
        members = list(_members(shard, begin, end))
        where = f"{shard}: {members[0].key.lstrip('/') if members else begin}"
        with one_sample(where):
            pictures = [member for member in members if member.kind in IMAGES]
            record = _record(shard, members, where)
            turns, order = _turns(record, pictures, where)
            images = [TarMember(shard, member.start, member.size, 0, 0) for member in order]
            return make_sample(record_name(record, where, members[0].key.lstrip("/")), turns, images, where)

    def fingerprint(self) -> str:
        digest = hashlib.blake2b(digest_size=16)
        for shard in self.shards:
            digest.update(shard.name.encode())
            for member in _members(shard):
                digest.update(repr(tuple(member)).encode())
        return digest.hexdigest()


def tar_files(folder: Path) -> list[Path]:
    """The tars in and below a folder, those of the `train` split where an Energon folder names them."""
    split = folder / ENERGON / "split.yaml"
    if not split.is_file():
        return sorted(file for file in folder.rglob("*.tar") if file.is_file())
    try:
        names = yaml.safe_load(split.read_text(encoding="utf-8"))["split_parts"]["train"]
        files = [folder / name for name in names]
    except (OSError, ValueError, TypeError, KeyError, yaml.YAMLError) as error:
        raise DataError(f"{split}: names no tars under split_parts, train ({reason(error)})") from None
    for file in files:
        if not os.path.abspath(file).startswith(os.path.abspath(folder) + os.sep) or not file.is_file():
            raise DataError(
                f"{split}: {shortened(str(file))} is no file of the folder; list each tar by its name"
            )
    return files


def _members(shard: Path, begin: int = 0, end: int | None = None) -> Iterator[_Member]:
    """The files of a tar, in order; those that begin within [begin, end) alone."""
    try:
        with shard.open("rb") as file:
            file.seek(begin)
            with tarfile.open(fileobj=file, mode="r:") as archive:
                for member in archive:
                    if end is not None and member.offset >= end:
                        return
                    if member.isfile():
                        start, size = member.offset_data, member.size
                        yield _Member(member.name, member.offset, start, size, member.chksum)
                # tarfile takes a header that it cannot read for the end.
                file.seek(archive.offset)
                if end is None and file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                    raise tarfile.ReadError(f"no end and no member at byte {archive.offset}")
    except FileNotFoundError:
        raise DataError(f"{shard}: no such file") from None
    except (OSError, tarfile.TarError, ValueError) as error:
        raise DataError(
            f"{shard}: no plain tar, or a damaged one ({reason(error)}); unpack a compressed one, download a "
            "damaged one again"
        ) from None


def _record(shard: Path, members: Sequence[_Member], where: str) -> dict[str, Any]:
    """What is said about the images, as a record; one of `caption` alone where there is nothing but a text."""
    for member in members:
        if medium := _UNREAD.get(member.kind):
            raise DataError(f"{where}: {medium} is not read, only images; drop the sample", kind=medium)
    record: dict[str, Any] = {}
    for member in members:
        if member.kind == "json":
            found = json.loads(read_range(shard, member.start, member.size))
            if not isinstance(found, dict):
                raise DataError(
                    f"{where}: {member.name} holds a {type(found).__name__}; a record is a JSON object"
                )
            record |= found
    for member in members:
        if member.kind in _TEXTS:
            record["caption"] = read_range(shard, member.start, member.size).decode("utf-8").strip()
    return record


def _turns(
    record: dict[str, Any], pictures: Sequence[_Member], where: str
) -> tuple[tuple[Turn, ...], Sequence[_Member]]:
    """The turns, and the images in their order."""
    if present(record, "conversations", "messages") is None:
        caption = present(record, "caption", "text")
        if not isinstance(caption, str) or not caption or not pictures:
            raise DataError(
                f"{where}: wanted images beside a json with conversations or messages, or beside a caption (txt)"
            )
        # As LLaVA's first stage has it: nothing but the image is asked.
        question = typed_turn("user", [""] * (len(pictures) + 1))
        return (question, Turn("assistant", caption)), pictures
    turns, named = read_turns(record, where)
    order = _named(image_references(record, named, where), pictures)
    if not any(turn.num_images for turn in turns) and order and turns:
        first = next((n for n, turn in enumerate(turns) if turn.role == "user"), None)
        if first is not None:
            question = typed_turn("user", behind_images(len(order), turns[first].text))
            turns = (*turns[:first], question, *turns[first + 1 :])
    return turns, order


def _named(references: Sequence[Any], pictures: Sequence[_Member]) -> Sequence[_Member]:
    """The images as the record names them, where it names members of the tar; in the tar's order where not."""
    by_name: dict[str, _Member] = {}
    for picture in pictures:
        by_name |= dict.fromkeys((picture.name, picture.name.rpartition("/")[2], picture.extension), picture)
    found = [by_name.get(name) if isinstance(name, str) else None for name in references]
    chosen = [picture for picture in found if picture is not None]
    return chosen if references and len(chosen) == len(references) else pictures
