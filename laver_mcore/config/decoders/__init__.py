"""Decoder families by name: the built-in ones, and those that an installed package registers."""

import functools
from collections.abc import Mapping
from importlib.metadata import entry_points
from pathlib import Path

from laver_mcore.config.decoders.family import DecoderFamily
from laver_mcore.config.decoders.llama import LLAMA
from laver_mcore.config.decoders.qwen2 import QWEN2
from laver_mcore.config.decoders.qwen3 import QWEN3
from laver_mcore.config.decoders.templates import TEMPLATES
from laver_mcore.config.errors import ConfigError, nearest

ENTRY_POINTS = "laver_mcore.decoders"
"""Group under which an installed package registers families of its own: name = "module:FAMILY"."""

BUILT_IN = {family.name: family for family in (QWEN2, LLAMA, QWEN3)}


@functools.cache
def known_families() -> Mapping[str, DecoderFamily]:
    """Every family, built in or installed."""
    installed = {point.name: point.load() for point in entry_points(group=ENTRY_POINTS)}
    return installed | BUILT_IN


def family_named(name: str | None) -> DecoderFamily:
    """The family called `name`; `ConfigError` names the nearest one."""
    known = known_families()
    if name is None or name not in known:
        raise ConfigError(
            f"family={name!r} is not known; did you mean {nearest(str(name), list(known))!r}? ({', '.join(known)})"
        )
    return known[name]


def family_of_type(model_type: str | None) -> DecoderFamily | None:
    """The family whose config.json has this `model_type`."""
    return next((f for f in known_families().values() if f.model_type == model_type), None)


def chat_templates(family: str | None, given: str | None) -> tuple[str | None, str]:
    """(The template that dialogues are written with whatever the tokenizer brings, if any; the one otherwise).

    `given` is the recipe's: a name of `templates`, or a file. `ConfigError` for anything else.
    """
    one = family_named(family)
    otherwise = TEMPLATES.get(one.chat_template, one.chat_template)
    if given is None:
        return (otherwise if one.overrides_template else None), otherwise
    if given in TEMPLATES:
        return TEMPLATES[given], otherwise
    try:
        return Path(given).read_text(encoding="utf-8"), otherwise
    except (OSError, UnicodeDecodeError):
        raise ConfigError(
            f"chat_template={given!r} is no readable file and none of {', '.join(TEMPLATES)}"
        ) from None
