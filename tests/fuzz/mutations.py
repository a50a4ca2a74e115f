"""Damage, drawn from a seed: of bytes as disks and downloads do it, of JSON as people do."""

import copy
import json
from random import Random
from typing import Any

ODD: list[Any] = [
    None, True, False, 0, 1, -1, 2**31, 2**63, 10**30, 0.5, 17.0, float("nan"), float("inf"), -1e308, "", " ", "x",
    "None", "\ud800", "\x00", "é" * 300, "<image>", "<|image_pad|>", "../../etc/passwd", "data:image/png;base64,AAAA",
    "http://example.org/a.png", [], [None], [[]], {}, {"": None}, {"type": "image"}, ["x"] * 50, [0, 0, 0],
]  # fmt: skip
"""Values that have been seen where others were wanted."""
_LONGEST = 2000


def bytes_of(random: Random, data: bytes) -> bytes:
    """A few changes of a file: bits, cuts, repeats, other text put in."""
    changed = bytearray(data)
    for _ in range(random.choice((1, 1, 2, 5))):
        at = random.randrange(len(changed) + 1)
        kind = random.randrange(6)
        if kind == 0 and at < len(changed):
            changed[at] ^= 1 << random.randrange(8)
        elif kind == 1:
            del changed[at:]
        elif kind == 2:
            del changed[at : at + random.randrange(1, 64)]
        elif kind == 3:
            changed[at:at] = random.randbytes(random.randrange(1, 16))
        elif kind == 4:
            changed[at:at] = changed[at : at + random.randrange(1, 64)]
        else:
            changed[at : at + 4] = random.choice((b"\0\0\0\0", b"\xff\xff\xff\xff", b"null", b"]}]}"))
    return bytes(changed)


def value_of(random: Random, value: Any) -> Any:
    """A JSON value with a few of its parts replaced, dropped or doubled."""
    changed = copy.deepcopy(value)
    for _ in range(random.choice((1, 1, 2, 3))):
        places = list(_places(changed))
        if not places:
            return random.choice(ODD)
        holder, key = random.choice(places)
        kind = random.randrange(4)
        if kind == 0:
            del holder[key]
        elif kind == 1 and isinstance(holder, list):
            holder.insert(key, copy.deepcopy(holder[key]))
        elif kind == 2 and isinstance(holder, dict):
            holder[random.choice((*holder, "id", "text", "size"))] = holder[key]
        else:
            holder[key] = copy.deepcopy(random.choice(ODD))
    return changed


def text_of(random: Random, value: Any) -> bytes:
    """A value as a JSON file, its bytes damaged as well once in four."""
    written = json.dumps(value_of(random, value)).encode("utf-8", "surrogatepass")
    return bytes_of(random, written) if random.random() < 0.25 else written


def _places(value: Any) -> Any:
    if not isinstance(value, dict | list):
        return
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
        yield value, key
        if isinstance(inner, dict | list) and len(inner) < _LONGEST:
            yield from _places(inner)
