"""LLaVA / ShareGPT JSON and JSONL, with a folder of images, read into samples.

A record is `{"id", "image" | "images", "conversations": [{"from", "value"}]}` or, as OpenAI writes it,
`{"id", "images", "messages": [{"role", "content"}]}`. `<image>` in a user turn marks where an image goes;
anywhere else it is text.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from laver_mcore.data.errors import DataError

IMAGE_PLACEHOLDER = "<image>"
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


@dataclass(frozen=True)
class Turn:
    """One message; `role` is user, assistant or system."""

    role: str
    text: str


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One conversation; its `<image>` placeholders and `images` agree in number and order.

    `key` is unique within what was read together, and is what masks are drawn from.
    """

    key: str
    turns: tuple[Turn, ...]
    images: tuple[Path, ...] = ()


def load_records(source: str | Path | Sequence[str | Path], image_folder: str | Path = ".") -> list[Sample]:
    """Read one JSON / JSONL file, or several in order; relative image names are looked up in `image_folder`.

    Raises DataError, naming file and line (JSONL, broken JSON) or record, for anything that cannot be used.
    """
    sources = [source] if isinstance(source, str | Path) else list(source)
    samples: list[Sample] = []
    seen: dict[str, int] = {}
    for path in map(Path, sources):
        records = tqdm(_records(path), desc=f"reading {path.name}", unit=" records", delay=2.0, disable=None)
        for number, (where, record) in enumerate(records):
            name = _name(record, where, default=f"{path.name}:{number}")
            # Published sets repeat ids; the mask draw needs distinct ones.
            key = name
            while key in seen:
                seen[name] += 1
                key = f"{name}#{seen[name]}"
            seen[key] = 0
            samples.append(parse_record(record, key=key, image_folder=Path(image_folder), where=where))
    if not samples:
        raise DataError(f"{', '.join(map(str, sources)) or 'the list of data files'}: holds no records")
    return samples


def parse_record(record: dict[str, Any], *, key: str, image_folder: Path, where: str) -> Sample:
    """Turn one decoded record into a `Sample`; `where` (file and line, or record) starts every error."""
    turns = _turns(record, where)
    images = tuple(image_folder / name for name in _image_names(record, where))
    num_placeholders = sum(turn.text.count(IMAGE_PLACEHOLDER) for turn in turns if turn.role == "user")
    if num_placeholders != len(images):
        raise DataError(
            f"{where}: {num_placeholders} {IMAGE_PLACEHOLDER} placeholder(s) in the user turns but "
            f"{len(images)} image(s); write one {IMAGE_PLACEHOLDER} per image"
        )
    for image in images:
        if not image.is_file():
            raise DataError(
                f"{where}: image {str(image)!r} does not exist; check the name and the image folder"
            )
    return Sample(key=key, turns=turns, images=images)


def _records(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (where, record) for every record of a file."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as UTF-8 text ({error})") from None
    if text.lstrip().startswith("["):
        pairs = [(f"{path}: record {i}", record) for i, record in enumerate(_parse(text, path, 1))]
    else:  # JSON lines, whatever the suffix says; published .json files are sometimes that
        lines = text.split("\n")  # not splitlines(): U+2028 may stand inside a JSON string
        pairs = [
            (f"{path}:{n}", _parse(line, path, n)) for n, line in enumerate(lines, start=1) if line.strip()
        ]
    for where, record in pairs:
        if not isinstance(record, dict):
            raise DataError(f"{where}: holds a {type(record).__name__}; a record is a JSON object")
        yield where, record


def _parse(text: str, path: Path, first_line: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        raise DataError(f"{path}:{line}: broken JSON at column {error.colno}: {error.msg}") from None


def _name(record: dict[str, Any], where: str, default: str) -> str:
    name = record.get("id", default)
    if not isinstance(name, str | int):
        raise DataError(f"{where}: id is a {type(name).__name__}; it must be a string or an integer")
    return str(name)


def _turns(record: dict[str, Any], where: str) -> tuple[Turn, ...]:
    field = "conversations" if "conversations" in record else "messages"
    if field not in record:
        raise DataError(
            f"{where}: no conversation; give 'conversations' (from, value) or 'messages' (role, content)"
        )
    entries = record[field]
    if not isinstance(entries, list) or not entries:
        raise DataError(f"{where}: {field!r} is empty or no list; give at least one question and its answer")
    turns = [_turn(entry, f"{where}, {field}[{i}]") for i, entry in enumerate(entries)]
    if isinstance(record.get("system"), str) and record["system"]:
        turns.insert(0, Turn("system", record["system"]))
    if any(turn.role == "system" for turn in turns[1:]):
        raise DataError(f"{where}: a system turn stands after the first turn; only the first may be one")
    if not any(turn.role == "assistant" for turn in turns):
        raise DataError(f"{where}: no assistant turn, so nothing to learn; add an answer or drop the record")
    return tuple(turns)


def _turn(entry: Any, where: str) -> Turn:
    if not isinstance(entry, dict):
        raise DataError(f"{where}: holds a {type(entry).__name__}; a turn is an object (from, value)")
    role = entry.get("from", entry.get("role"))
    if not isinstance(role, str) or role not in ROLES:
        raise DataError(f"{where}: the speaker is {role!r}; use one of {', '.join(ROLES)}")
    text = entry.get("value", entry.get("content"))
    if isinstance(text, list):
        text = "".join(_part(part, where) for part in text)
    if not isinstance(text, str):
        raise DataError(f"{where}: the text is a {type(text).__name__}; it must be a string")
    return Turn(ROLES[role], text)


def _part(part: Any, where: str) -> str:
    """The text of one typed part of an OpenAI-style content list."""
    if isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return part["text"]
    if isinstance(part, dict) and part.get("type") == "image":
        return IMAGE_PLACEHOLDER
    raise DataError(
        f"{where}: a content part must be {{type: text, text}} or {{type: image}}, not {str(part)[:60]!r}"
    )


def _image_names(record: dict[str, Any], where: str) -> list[str]:
    names = record.get("image") or record.get("images") or []
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise DataError(
            f"{where}: 'image' must be a file name or a list of file names, not {str(names)[:60]!r}"
        )
    return names
