"""One typed sample, and the records that it is made from.

A LLaVA / ShareGPT record is `{"id", "image" | "images", "conversations": [{"from", "value"}]}` or, as OpenAI
writes it, `{"id", "images", "messages": [{"role", "content"}]}`. `<image>` in a user turn marks where an
image goes; anywhere else it is text. In a typed content list an image is a part of its own, and `<image>` is
text. Parquet rows of LLaVA-OneVision are records of the first kind; FineVision's are `{"images", "texts":
[{user, assistant}]}` without placeholders, so its images stand in front of the first question.
"""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from laver_mcore.data.errors import DataError
from laver_mcore.data.images.source import ImageSource

IMAGE_PLACEHOLDER = "<image>"
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


@dataclass(frozen=True)
class Turn:
    """One message; `role` is user, assistant or system.

    Images stand at the `<image>` placeholders of a user turn's `text`, unless `pieces` gives typed content:
    the texts before, between and behind the images, in which `<image>` is text like any other.
    """

    role: str
    text: str
    pieces: tuple[str, ...] | None = None

    def split(self) -> list[str]:
        """Texts before, between and behind the turn's images: one more than there are images."""
        if self.pieces is not None:
            return list(self.pieces)
        return self.text.split(IMAGE_PLACEHOLDER) if self.role == "user" else [self.text]

    @property
    def num_images(self) -> int:
        return len(self.split()) - 1


def typed_turn(role: str, pieces: Sequence[str]) -> Turn:
    """A turn with images between `pieces`; plain where cutting its text at `<image>` gives the same."""
    plain = Turn(role, IMAGE_PLACEHOLDER.join(pieces))
    return plain if plain.split() == list(pieces) else Turn(role, plain.text, tuple(pieces))


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One conversation; the images in its turns and `images` agree in number and order.

    `key` is unique within what was read together, and is what masks are drawn from.
    """

    key: str
    turns: tuple[Turn, ...]
    images: tuple[ImageSource, ...] = ()


def load_records(source: str | Path | Sequence[str | Path], image_folder: str | Path = ".") -> list[Sample]:
    """Read one JSON / JSONL file, or several in order; relative image names are looked up in `image_folder`.

    Raises DataError, naming file and line (JSONL, broken JSON) or record, for anything that cannot be used.
    """
    sources = [source] if isinstance(source, str | Path) else list(source)
    samples: list[Sample] = []
    keys = UniqueKeys()
    for path in map(Path, sources):
        records = tqdm(
            json_records(path), desc=f"reading {path.name}", unit=" records", delay=2.0, disable=None
        )
        for number, (where, record, _, _) in enumerate(records):
            key = keys(record_name(record, where, default=f"{path.name}:{number}"))
            samples.append(parse_record(record, key=key, image_folder=Path(image_folder), where=where))
    if not samples:
        raise DataError(f"{', '.join(map(str, sources)) or 'the list of data files'}: holds no records")
    return samples


class UniqueKeys:
    """Names -> distinct keys: published sets repeat ids, and the mask draw needs distinct ones."""

    def __init__(self) -> None:
        self._seen: dict[str, int] = {}

    def __call__(self, name: str) -> str:
        key = name
        while key in self._seen:
            self._seen[name] += 1
            key = f"{name}#{self._seen[name]}"
        self._seen[key] = 0
        return key


def parse_record(
    record: dict[str, Any], *, key: str, image_folder: Path, where: str, check_files: bool = True
) -> Sample:
    """Turn one decoded record into a `Sample`; `where` (file and line, or record) starts every error."""
    images = tuple(image_folder / name for name in _image_names(record, where))
    sample = make_sample(key, record_turns(record, where), images, where)
    for image in images if check_files else ():
        if not image.is_file():
            raise DataError(
                f"{where}: image {str(image)!r} does not exist; check the name and the image folder"
            )
    return sample


def make_sample(key: str, turns: tuple[Turn, ...], images: Sequence[ImageSource], where: str) -> Sample:
    """A `Sample`; DataError when its turns have not one place for each image."""
    num_placeholders = sum(turn.num_images for turn in turns)
    if num_placeholders != len(images):
        raise DataError(
            f"{where}: {num_placeholders} {IMAGE_PLACEHOLDER} placeholder(s) in the user turns but "
            f"{len(images)} image(s); write one {IMAGE_PLACEHOLDER} per image"
        )
    return Sample(key=key, turns=turns, images=tuple(images))


def json_records(path: Path) -> Iterator[tuple[str, dict[str, Any], int, int]]:
    """Yield (where, record, offset, size) for every record of a JSON or JSONL file; the last two in bytes."""
    try:
        raw = path.read_bytes()
        text = raw.decode("utf-8-sig")
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as UTF-8 text ({error})") from None
    start = 3 if raw.startswith(b"\xef\xbb\xbf") else 0
    del raw
    # JSON lines, whatever the suffix says; published .json files are sometimes that.
    pairs = _array(text, path, start) if text.lstrip().startswith("[") else _lines(text, path, start)
    for where, record, offset, size in pairs:
        if not isinstance(record, dict):
            raise DataError(f"{where}: holds a {type(record).__name__}; a record is a JSON object")
        yield where, record, offset, size


def _array(text: str, path: Path, offset: int) -> Iterator[tuple[str, Any, int, int]]:
    """The records of a JSON array, one at a time, so that a large file never becomes one large object."""
    decoder = json.JSONDecoder()
    space = re.compile(r"[ \t\n\r]*")

    def skip(position: int) -> int:
        return space.match(text, position).end()  # type: ignore[union-attr]

    position = skip(0) + 1
    counted = 0  # characters whose bytes `offset` counts
    number = 0
    try:
        while text[(position := skip(position))] != "]" or number:
            record, end = decoder.raw_decode(text, position)
            offset += len(text[counted:position].encode())
            size = len(text[position:end].encode())
            yield f"{path}: record {number}", record, offset, size
            offset, counted, number = offset + size, end, number + 1
            position = skip(end)
            if text[position] == "]":
                break
            if text[position] != ",":
                raise ValueError
            position += 1
        if text[position + 1 :].strip():
            raise ValueError
    except (ValueError, IndexError):
        _parse(text, path, 1)  # names line and column
        raise DataError(f"{path}: broken JSON behind record {number}") from None


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


def record_name(record: dict[str, Any], where: str, default: str) -> str:
    name = record.get("id", default)
    if not isinstance(name, str | int):
        raise DataError(f"{where}: id is a {type(name).__name__}; it must be a string or an integer")
    return str(name)


def record_turns(record: dict[str, Any], where: str) -> tuple[Turn, ...]:
    """The turns of a record with `conversations` or `messages`."""
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
        return typed_turn(ROLES[role], typed_pieces(text, where))
    if not isinstance(text, str):
        raise DataError(f"{where}: the text is a {type(text).__name__}; it must be a string")
    return Turn(ROLES[role], text)


def typed_pieces(parts: list[Any], where: str) -> list[str]:
    """The texts around the images of a typed content list, `{type: text, text}` and `{type: image}`."""
    pieces = [""]
    for part in parts:
        if isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str):
            pieces[-1] += part["text"]
        elif isinstance(part, dict) and part.get("type") == "image":
            pieces.append("")
        else:
            raise DataError(
                f"{where}: a content part must be {{type: text, text}} or {{type: image}}, "
                f"not {str(part)[:60]!r}"
            )
    return pieces


def _image_names(record: dict[str, Any], where: str) -> list[str]:
    names = record.get("image") or record.get("images") or []
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise DataError(
            f"{where}: 'image' must be a file name or a list of file names, not {str(names)[:60]!r}"
        )
    return names
