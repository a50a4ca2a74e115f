"""Where an image's encoded bytes lie: a file, a member of a tar shard, or a cell of a parquet table."""

import functools
import os
import threading
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from laver_mcore.data.errors import DataError, reason, shortened

_OPEN_SHARDS = 256
_KEPT_ROW_GROUPS = 4


@dataclass(frozen=True)
class TarMember:
    """Bytes [offset, offset + size) of a tar file.

    `width` and `height` in pixels as written at preparation, 0 where nobody has measured them.
    """

    path: Path
    offset: int
    size: int
    width: int
    height: int

    def __str__(self) -> str:
        return f"{self.path} at byte {self.offset}"


@dataclass(frozen=True)
class ParquetCell:
    """Image `index` of one row of a parquet file."""

    path: Path
    row_group: int
    row: int  # within the row group
    column: str
    index: int

    def __str__(self) -> str:
        return f"{self.path}, row group {self.row_group}, row {self.row}, {self.column}[{self.index}]"


@dataclass(frozen=True)
class LoadedImage:
    """Encoded bytes that were read already."""

    name: str
    data: bytes

    def __str__(self) -> str:
        return self.name


ImageSource = Path | TarMember | ParquetCell | LoadedImage


def read_image_bytes(source: ImageSource) -> bytes:
    """The encoded bytes of an image; DataError naming it when they cannot be read."""
    try:
        if isinstance(source, Path):
            return source.read_bytes()
        if isinstance(source, LoadedImage):
            return source.data
        if isinstance(source, TarMember):
            return read_range(source.path, source.offset, source.size)
    except OSError as error:
        why = error.strerror or error
        raise DataError(
            f"{shortened(str(source), 160)}: cannot be read ({why}); check the file or drop its record",
            kind="image",
        ) from None
    row = read_parquet_row(source.path, source.row_group, source.row)
    return image_cells(row[source.column])[source.index]


def image_cells(value: Any) -> list[bytes]:
    """The encoded images of a parquet cell: null, one `{bytes, path}` struct, or a list of them."""
    cells = [] if value is None else value if isinstance(value, list) else [value]
    images = []
    for cell in cells:
        data = cell.get("bytes") if isinstance(cell, dict) else cell
        if cell is None or (isinstance(cell, dict) and data is None and cell.get("path") is None):
            continue
        if not isinstance(data, bytes):
            raise DataError(
                f"an image cell holds no bytes but {str(cell)[:60]!r}; embed the images in the file",
                kind="image",
            )
        images.append(data)
    return images


def read_range(path: Path, offset: int, size: int) -> bytes:
    """`size` bytes of a file from `offset`; OSError when the file ends before."""
    shard = _shard(path, os.getpid())  # held: the cache may drop it meanwhile in another thread
    data = os.pread(int(shard), size, offset)
    if len(data) != size:
        raise OSError(f"holds {len(data)} of {size} bytes")
    return data


@functools.lru_cache(maxsize=_OPEN_SHARDS)
def _shard(path: Path, _pid: int) -> "_Descriptor":
    return _Descriptor(path)


class _Descriptor:
    """A read-only file descriptor that closes itself when the cache drops it."""

    def __init__(self, path: Path) -> None:
        self._number = os.open(path, os.O_RDONLY)

    def __int__(self) -> int:
        return self._number

    def __del__(self) -> None:
        number = getattr(self, "_number", None)
        if number is not None:
            os.close(number)


class _RowGroups:
    """The row groups read last: a table cannot be read by single rows."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._groups: OrderedDict[tuple[Path, int], Any] = OrderedDict()

    def get(self, path: Path, group: int) -> Any:
        with self._lock:
            if (path, group) in self._groups:
                self._groups.move_to_end((path, group))
            else:
                self._groups[path, group] = _read_group(path, group)
                while len(self._groups) > _KEPT_ROW_GROUPS:
                    self._groups.popitem(last=False)
            return self._groups[path, group]


_row_groups = _RowGroups()


def read_parquet_row(path: Path, row_group: int, row: int) -> dict[str, Any]:
    """One row as Python values; DataError when the file is damaged."""
    try:
        return _row_groups.get(path, row_group).slice(row, 1).to_pylist()[0]
    except DataError:
        raise
    except Exception as error:  # whatever damage provokes in pyarrow, SystemError among it
        raise DataError(
            f"{path}: row group {row_group} cannot be read ({reason(error)}); download it again"
        ) from None


def row_counts(path: Path) -> list[int]:
    """The number of rows of each group of a table: of parquet's row groups, or of Arrow's record batches."""
    if is_arrow(path):
        return [batch.num_rows for batch in _arrow_batches(path)]
    metadata = open_parquet(path).metadata
    return [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]


def is_arrow(path: Path) -> bool:
    """Whether a table is in Arrow's stream format, as Hugging Face `datasets` keeps it."""
    return path.suffix.lower() == ".arrow"


def _read_group(path: Path, group: int) -> Any:
    if not is_arrow(path):
        return open_parquet(path).read_row_group(group)
    batch = _arrow_batches(path)[group]
    batch.validate(full=True)  # offsets that lead out of the file would end the process
    return batch


def _arrow_batches(path: Path) -> list[Any]:
    try:
        import pyarrow
    except ImportError:
        raise DataError(
            f"{path}: reading Arrow needs pyarrow; install the extra: laver-mcore[data]"
        ) from None
    try:
        return pyarrow.ipc.open_stream(pyarrow.memory_map(str(path))).read_all().to_batches()
    except Exception as error:  # whatever damage provokes in pyarrow
        raise DataError(f"{path}: not an Arrow stream ({reason(error)}); download it again") from None


def open_parquet(path: Path) -> Any:
    """A `pyarrow.parquet.ParquetFile`; DataError when pyarrow is missing or the file is no parquet."""
    try:
        import pyarrow.parquet as parquet
    except ImportError:
        raise DataError(
            f"{path}: reading parquet needs pyarrow; install the extra: laver-mcore[data]"
        ) from None
    try:
        return parquet.ParquetFile(path)
    except Exception as error:  # whatever damage provokes in pyarrow
        raise DataError(f"{path}: not a parquet file ({reason(error)}); download it again") from None
