"""A decoded record -> a sample, in each of the forms that people write.

    LLaVA, ShareGPT  {"id", "image" | "images", "conversations": [{"from", "value"}]}; `<image>` in a user
                     turn marks where an image goes, anywhere else it is text
    OpenAI           {"messages": [{"role", "content"}]}, content text or parts {type: text | image_url}
    Qwen2-VL         the same with parts {type: image, image: path}
    ms-swift         {"messages", "images"} with `<image>` in the text
    Qwen-VL          {"conversations"} with <img>path</img> in the text

Conversations may also be JSON in a string, or a mapping of lists as tables give them back. In typed content an
image is a part of its own, and `<image>` is text.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from laver_mcore.data.errors import DataError, one_sample, shortened
from laver_mcore.data.records.image_reference import ImageFolder, check_exists
from laver_mcore.data.records.json_file import json_records
from laver_mcore.data.records.sample import ROLES, Sample, Turn, UniqueKeys, make_sample, typed_turn
from laver_mcore.data.records.values import is_absent, present

UNREAD_MEDIA = {"video": "video", "videos": "video", "audio": "audio", "audios": "audio"}
"""Fields of media that this engine does not read -> what their rejects are counted as."""
_IMAGE_PARTS = ("image", "image_url", "input_image")
_TEXT_PARTS = ("text", "input_text", "output_text")
_NO_IMAGE: tuple[Any, ...] = (None, "", [])
_QWEN_VL_IMAGE = re.compile(r"<img>(.*?)</img>", re.DOTALL)


def load_records(
    source: str | Path | Sequence[str | Path], image_folder: str | Path = ".", *, check_files: bool = True
) -> list[Sample]:
    """Read one JSON / JSONL file, or several in order; relative image names are looked up in `image_folder`.

    `check_files` refuses an image that is not there.

    Raises DataError, naming file and line (JSONL, broken JSON) or record, for anything that cannot be used.
    """
    sources = [source] if isinstance(source, str | Path) else list(source)
    samples: list[Sample] = []
    keys = UniqueKeys()
    images = ImageFolder(Path(image_folder))
    for path in map(Path, sources):
        records = tqdm(
            json_records(path), desc=f"reading {path.name}", unit=" records", delay=2.0, disable=None
        )
        for number, (where, record, _, _) in enumerate(records):
            key = keys(record_name(record, where, default=f"{path.name}:{number}"))
            sample = parse_record(record, key=key, images=images, where=where, check_files=check_files)
            samples.append(sample)
    if not samples:
        raise DataError(f"{', '.join(map(str, sources)) or 'the list of data files'}: holds no records")
    return samples


def parse_record(
    record: dict[str, Any], *, key: str, images: ImageFolder, where: str, check_files: bool = True
) -> Sample:
    """Turn one decoded record into a `Sample`; `where` (file and line, or record) starts every error."""
    with one_sample(where):
        turns, named = read_turns(record, where)
        references = image_references(record, named, where)
        found = tuple(images.find(reference, where) for reference in references)
        sample = make_sample(key, turns, found, where)
        for image in found if check_files else ():
            check_exists(image, where)
    return sample


def record_name(record: dict[str, Any], where: str, default: str) -> str:
    """The record's own id, as text; `default` where it has none."""
    name = present(record, "id")
    if name is None:
        return default
    if isinstance(name, float) and name.is_integer():  # as pandas writes whole numbers beside a missing one
        name = int(name)
    if not isinstance(name, str | int):
        raise DataError(f"{where}: id is a {type(name).__name__}; it must be a string or an integer")
    return str(name)


def read_turns(record: dict[str, Any], where: str) -> tuple[tuple[Turn, ...], list[Any]]:
    """The turns of a record, and for each image in them the name that stands there, None where none does."""
    _check_media(record, where)
    field = "conversations" if present(record, "conversations") is not None else "messages"
    entries = _entries(present(record, field), where, field)
    turns: list[Turn] = []
    named: list[Any] = []
    inline = is_absent(present(record, "image", "images"))  # <img> is Qwen-VL's where nothing else is named
    for number, entry in enumerate(entries):
        turn, names = _turn(entry, f"{where}, {field}[{number}]", inline)
        turns.append(turn)
        named += names
    system = present(record, "system")
    if isinstance(system, str) and system:
        turns.insert(0, Turn("system", system))
    if any(turn.role == "system" for turn in turns[1:]):
        raise DataError(f"{where}: a system turn stands after the first turn; only the first may be one")
    if not any(turn.role == "assistant" for turn in turns):
        raise DataError(f"{where}: no assistant turn, so nothing to learn; add an answer or drop the record")
    return tuple(turns), named


def image_references(record: dict[str, Any], named: Sequence[Any], where: str) -> list[Any]:
    """What names each image, in order: where it stands in the text, else the record's list, from the front."""
    listed = _listed_images(record, where)
    if listed == [*named]:  # named in both places
        return listed
    rest = iter(listed)
    filled = [next(rest, None) if name is None else name for name in named]
    return [*(name for name in filled if name is not None), *rest]


def _listed_images(record: dict[str, Any], where: str) -> list[Any]:
    found: list[Any] = [
        value for name in ("image", "images") if (value := present(record, name)) not in _NO_IMAGE
    ]
    value = found[0] if found else []
    names = value if isinstance(value, list) else [value]
    if not all(name and isinstance(name, str | dict) for name in names):
        raise DataError(
            f"{where}: 'image' must be a file name or a list of file names, not {shortened(str(value), 60)!r}",
            kind="image",
        )
    return names


def _check_media(record: dict[str, Any], where: str) -> None:
    for field, kind in UNREAD_MEDIA.items():
        if present(record, field) not in _NO_IMAGE:
            raise DataError(f"{where}: {kind} is not read, only images; drop the record", kind=kind)


def _entries(value: Any, where: str, field: str) -> list[Any]:
    """The list of turns, however it is written down."""
    if value is None:
        raise DataError(
            f"{where}: no conversation; give 'conversations' (from, value) or 'messages' (role, content)"
        )
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            raise DataError(f"{where}: {field!r} is text that is no JSON list of turns") from None
    if isinstance(value, dict) and value and all(isinstance(column, list) for column in value.values()):
        if len({len(column) for column in value.values()}) != 1:
            raise DataError(f"{where}: the lists of {field!r} differ in length")
        value = [dict(zip(value, row, strict=True)) for row in zip(*value.values(), strict=True)]
    if not isinstance(value, list) or not value:
        raise DataError(f"{where}: {field!r} is empty or no list; give at least one question and its answer")
    return value


def _turn(entry: Any, where: str, inline: bool) -> tuple[Turn, list[Any]]:
    if not isinstance(entry, dict):
        raise DataError(f"{where}: holds a {type(entry).__name__}; a turn is an object (from, value)")
    role = present(entry, "from", "role")
    if not isinstance(role, str) or role not in ROLES:
        raise DataError(f"{where}: the speaker is {shortened(repr(role))}; use one of {', '.join(ROLES)}")
    role, text = ROLES[role], present(entry, "value", "content")
    if isinstance(text, list):
        pieces, names = typed_content(text, where)
        if len(pieces) > 1 and role != "user":
            raise DataError(f"{where}: an image in a turn of {role!r}; only the user's may hold one")
        return typed_turn(role, pieces), names
    if not isinstance(text, str):
        raise DataError(f"{where}: the text is a {type(text).__name__}; it must be a string")
    if role != "user":
        return Turn(role, text), []
    if inline and _QWEN_VL_IMAGE.search(text):
        pieces = _QWEN_VL_IMAGE.split(text)
        return typed_turn(role, pieces[::2]), pieces[1::2]
    turn = Turn(role, text)
    if turn.num_images == 0 and text.lstrip().startswith("<video>"):
        raise DataError(f"{where}: video is not read, only images; drop the record", kind="video")
    return turn, [None] * turn.num_images


def typed_content(parts: list[Any], where: str) -> tuple[list[str], list[Any]]:
    """The texts around the images of a typed content list, and the images' names where their parts have one."""
    pieces, names = [""], []
    for part in parts:
        kind = _part_kind(part)
        if kind in _TEXT_PARTS and isinstance(part.get("text"), str):
            pieces[-1] += part["text"]
        elif kind in _IMAGE_PARTS:
            pieces.append("")
            names.append(present(part, "image", "image_url", "url", "path"))
        elif kind.removeprefix("input_").removesuffix("_url") in UNREAD_MEDIA:
            medium = UNREAD_MEDIA[kind.removeprefix("input_").removesuffix("_url")]
            raise DataError(f"{where}: {medium} is not read, only images; drop the record", kind=medium)
        else:
            raise DataError(
                f"{where}: a content part must be {{type: text, text}} or {{type: image, image}}, "
                f"not {shortened(str(part), 60)!r}"
            )
    return pieces, names


def _part_kind(part: Any) -> str:
    """What a part is: its type, or the one field that it has."""
    if not isinstance(part, dict):
        return ""
    kind = present(part, "type")
    if kind is None:
        return next(
            (name for name in ("text", "image", "image_url", "video", "audio") if present(part, name)), ""
        )
    return kind if isinstance(kind, str) else ""


def typed_pieces(parts: list[Any], where: str) -> list[str]:
    """The texts around the images of a typed content list."""
    return typed_content(parts, where)[0]
