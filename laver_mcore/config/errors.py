"""The error of a recipe, and of everything that follows from one."""

import difflib
from collections.abc import Sequence


class ConfigError(ValueError):
    """A configuration that cannot run; the message is one line with what was given, wanted, and a way out."""


def nearest(name: str, known: Sequence[str]) -> str:
    """The known name closest to `name`, for error messages."""
    return difflib.get_close_matches(name, known, 1, 0.0)[0]
