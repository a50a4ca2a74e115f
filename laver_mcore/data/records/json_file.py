"""A JSON or JSONL file, record by record, with the bytes at which each stands."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from laver_mcore.data.errors import DataError, reason

LIST_FIELDS = ("data", "records", "samples", "annotations")
"""Where a mapping around the list of records keeps it."""
_SPACE = re.compile(r"[ \t\n\r]*")
_WRAPPED = re.compile(r"\s*\{\s*\"(" + "|".join(LIST_FIELDS) + r")\"\s*:\s*(?=\[)")

Found = tuple[str, dict[str, Any], int, int]


def json_records(path: Path) -> Iterator[Found]:
    """Yield (where, record, offset, size) for every record of a file; the last two in bytes.

    A file is a list of records, records line by line whatever its suffix says, a single record over several
    lines, or `{"data": [...]}` with the list first. DataError names file and line of broken JSON.
    """
    try:
        raw = path.read_bytes()
        text = raw.decode("utf-8-sig")
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as UTF-8 text ({error})") from None
    start = 3 if raw.startswith(b"\xef\xbb\xbf") else 0
    del raw
    for where, record, offset, size in _values(text, path, start):
        if not isinstance(record, dict):
            raise DataError(f"{where}: holds a {type(record).__name__}; a record is a JSON object")
        lists = [name for name in LIST_FIELDS if isinstance(record.get(name), list)]
        if lists and not {"conversations", "messages"} & set(record):
            raise DataError(
                f"{where}: holds records under {lists[0]!r}; put that field first, or give the list"
            )
        yield where, record, offset, size


def _values(text: str, path: Path, start: int) -> Iterator[tuple[str, Any, int, int]]:
    begin = _skip(text, 0)
    if text.startswith("[", begin):
        return _array(text, path, start, begin)
    if wrapped := _WRAPPED.match(text):
        return _array(text, path, start, wrapped.end(), tail=_wrapper_tail)
    if text.startswith("{", begin) and not _is_json(text[begin:].partition("\n")[0]):
        return _single(text, path, start, begin)
    return _lines(text, path, start)


def _skip(text: str, position: int) -> int:
    return _SPACE.match(text, position).end()  # type: ignore[union-attr]


def _is_json(line: str) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True


def _array(
    text: str, path: Path, offset: int, position: int, tail: Any = None
) -> Iterator[tuple[str, Any, int, int]]:
    """The records of a JSON array, one at a time, so that a large file never becomes one large object."""
    decoder = json.JSONDecoder()
    position += 1
    counted = 0  # characters whose bytes `offset` counts
    number = 0
    try:
        while text[(position := _skip(text, position))] != "]" or number:
            record, end = decoder.raw_decode(text, position)
            offset += len(text[counted:position].encode())
            size = len(text[position:end].encode())
            yield f"{path}: record {number}", record, offset, size
            offset, counted, number = offset + size, end, number + 1
            position = _skip(text, end)
            if text[position] == "]":
                break
            if text[position] != ",":
                raise ValueError
            position += 1
        rest = text[position + 1 :].strip()
        if rest if tail is None else not tail(rest):
            raise ValueError
    except (ValueError, IndexError, RecursionError):
        _parse(text, path, 1)  # names line and column
        raise DataError(f"{path}: broken JSON behind record {number}") from None


def _wrapper_tail(rest: str) -> bool:
    """Whether what stands behind the list closes the mapping, further fields included."""
    return rest == "}" or (rest.startswith(",") and _is_json("{" + rest[1:]))


def _single(text: str, path: Path, start: int, begin: int) -> Iterator[tuple[str, Any, int, int]]:
    """One record over several lines; where more follow, the line of the second is named."""
    record = _parse(text, path, 1)
    offset = start + len(text[:begin].encode())
    yield f"{path}: record 0", record, offset, len(text[begin:].rstrip().encode())


def _lines(text: str, path: Path, offset: int) -> Iterator[tuple[str, Any, int, int]]:
    for number, line in enumerate(text.split("\n"), start=1):  # U+2028 may stand inside a JSON string
        size = len(line.encode())
        if line.strip():
            yield f"{path}:{number}", _parse(line, path, number), offset, size
        offset += size + 1


def _parse(text: str, path: Path, first_line: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        raise DataError(f"{path}:{line}: broken JSON at column {error.colno}: {error.msg}") from None
    except (ValueError, RecursionError) as error:  # an integer of 5,000 digits, brackets 10,000 deep
        raise DataError(f"{path}:{first_line}: JSON that cannot be read ({reason(error)})") from None
