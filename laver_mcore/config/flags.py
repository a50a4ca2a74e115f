"""Flags of the commands beside training, read by argparse, refused in one line."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from laver_mcore.config.errors import nearest


class FlagParser(argparse.ArgumentParser):
    """argparse in which dashes and underscores are the same, nothing is abbreviated, and an error is one line.

    `description` is a module's docstring. The error of several ranks is said once; its exit status is 2.
    """

    def __init__(self, description: str | None, *, add_help: bool = True) -> None:
        super().__init__(
            prog=Path(sys.argv[0]).name,
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
            add_help=add_help,
        )

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """The flags; a misspelt one is named with its nearest neighbour."""
        args = sys.argv[1:] if args is None else args
        flags = [flag for flag in self._option_string_actions if flag.startswith("--")]
        for flag in (arg.split("=", 1)[0] for arg in self._dashed(args) if arg.startswith("--")):
            if flag not in flags:
                self.error(f"unknown flag {flag}; did you mean {nearest(flag, flags)}?")
        return super().parse_args(args, namespace)

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """(Flags, what is left for another to read)."""
        args = sys.argv[1:] if args is None else args
        return super().parse_known_args(self._dashed(args), namespace)

    def _dashed(self, args: Sequence[str]) -> list[str]:
        """The arguments, flags of this parser spelt with dashes."""
        found = []
        for arg in args:
            flag, *value = arg.split("=", 1)
            dashed = flag.replace("_", "-")
            found.append("=".join([dashed, *value]) if dashed in self._option_string_actions else arg)
        return found

    def want_at_least(self, lowest: int, args: argparse.Namespace, *names: str) -> None:
        """Refuse a flag below `lowest`; one that was not given passes."""
        for name in names:
            if (value := getattr(args, name)) is not None and value < lowest:
                self.error(f"--{name.replace('_', '-')} {value} is not at least {lowest}")

    def error(self, message: str) -> NoReturn:
        """End the program with status 2 and one line."""
        self.exit(2, f"{self.prog}: error: {message}\n" if os.environ.get("RANK", "0") == "0" else None)


def file_to_write(text: str) -> Path:
    """A file that can be made here, found out before any work is done for it."""
    path = Path(text)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{path} is a folder; give a file")
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"{path}: its folder does not exist")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"{path} cannot be written")
    return path


def folder_to_write(text: str) -> Path:
    """A folder that is there or can be made."""
    path = Path(text)
    there = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
    if not there.is_dir():
        raise argparse.ArgumentTypeError(f"{there} is a file; give a folder")
    if not os.access(there, os.W_OK):
        raise argparse.ArgumentTypeError(f"{there} cannot be written to")
    return path
