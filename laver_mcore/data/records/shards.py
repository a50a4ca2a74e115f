"""Prepared tar shards: `{key}.json`, then `{key}.{i}.jpg|png`, as webdataset and Energon read them.

Beside each `x.tar` lies `x.idx`, DALI's index of it (format v1.2: a line a sample, `extension offset size
name` for each member), which is also where this engine finds the records. Offsets are those of a member's
bytes.
"""

import hashlib
import io
import os
import struct
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from laver_mcore.data.errors import DataError

MANIFEST = "manifest.json"
BLOCK = 512


def _padded(size: int) -> int:
    return (size + BLOCK - 1) // BLOCK * BLOCK


def member_offsets(offset: int, size: int, sizes: Sequence[int]) -> list[int]:
    """Where the members behind one at `offset` of `size` bytes begin, each of the given size."""
    starts = []
    end = offset + _padded(size)
    for member in sizes:
        starts.append(end + BLOCK)  # its header is one block
        end += BLOCK + _padded(member)
    return starts


def index_path(shard: Path) -> Path:
    """DALI's index of a shard."""
    return shard.with_suffix(".idx")


def record_offsets(shard: Path) -> Iterator[tuple[int, int]]:
    """Yield (offset, size) of every record of a shard, from its index; DataError when that is damaged."""
    try:
        lines = index_path(shard).read_text(encoding="ascii").splitlines()
        version, count = lines[0].split(" ")
        if version != "v1.2" or int(count) != len(lines) - 1:
            raise ValueError(f"{version}, {count} samples in {len(lines) - 1} lines")
        for line in lines[1:]:
            extension, offset, size, _ = line.split(" ", 3)
            if extension != "json":
                raise ValueError(f"a sample begins with {extension!r}")
            yield int(offset), int(size)
    except (OSError, ValueError, IndexError) as error:
        reason = str(error).split("\n")[0]
        raise DataError(
            f"{index_path(shard)}: no index of {shard.name} ({reason}); prepare the set again"
        ) from None


@dataclass(frozen=True, kw_only=True)
class ShardSummary:
    """What the manifest says of one shard."""

    name: str
    num_samples: int
    num_bytes: int
    blake2b: str

    def as_dict(self) -> dict[str, Any]:
        return dict(vars(self))


class ShardWriter:
    """Writes one shard; it appears under its name, whole and with its indices, when it is closed."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._temporary = path.with_suffix(".tar.partial")
        self._file = self._temporary.open("wb")
        self._hash = hashlib.blake2b(digest_size=16)
        self._offset = 0
        self._lines: list[str] = []
        self._starts: list[int] = []

    def add(self, key: str, record: bytes, images: Sequence[tuple[str, bytes]]) -> None:
        """Append one sample: its JSON, then its images as (extension, bytes); `key` holds no dot."""
        self._starts.append(self._offset)
        members = [("json", record), *((f"{n}.{ext}", data) for n, (ext, data) in enumerate(images))]
        fields = []
        for extension, data in members:
            offset = self._member(f"{key}.{extension}", data)
            fields.append(f"{extension} {offset} {len(data)} {key}.{extension}")
        self._lines.append(" ".join(fields))

    def close(self) -> ShardSummary:
        """Finish the archive and put it in place."""
        end = self._offset
        self._write(b"\0" * 2 * BLOCK)
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        index = "\n".join([f"v1.2 {len(self._lines)}", *self._lines]) + "\n"
        index_path(self._path).write_text(index, encoding="ascii")
        # Energon's index: where each sample begins, and where the last one ends, 64-bit little-endian.
        offsets = [*self._starts, end]
        self._path.with_suffix(".tar.idx").write_bytes(struct.pack(f"<{len(offsets)}Q", *offsets))
        self._temporary.replace(self._path)
        return ShardSummary(
            name=self._path.name,
            num_samples=len(self._lines),
            num_bytes=self._offset,
            blake2b=self._hash.hexdigest(),
        )

    def abandon(self) -> None:
        """Leave nothing behind."""
        self._file.close()
        self._temporary.unlink(missing_ok=True)

    def _member(self, name: str, data: bytes) -> int:
        info = tarfile.TarInfo(name)
        info.size, info.mode = len(data), 0o644
        self._write(info.tobuf(tarfile.USTAR_FORMAT))
        offset = self._offset
        self._write(data + b"\0" * (_padded(len(data)) - len(data)))
        return offset

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self._hash.update(data)
        self._offset += len(data)


def read_members(shard: Path) -> Iterator[tuple[str, bytes]]:
    """Yield (name, bytes) of every member, read front to back; DataError when the archive is damaged."""
    try:
        with tarfile.open(shard, "r|", format=tarfile.USTAR_FORMAT) as archive:
            for member in archive:
                file = archive.extractfile(member)
                yield member.name, (file or io.BytesIO()).read()
    except (OSError, tarfile.TarError) as error:
        raise DataError(f"{shard}: damaged archive ({error}); prepare the set again") from None
