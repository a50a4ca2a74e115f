"""How a record names an image: a path, a file URL, a data URI, or `{path, bytes}` as datasets write it."""

import base64
import binascii
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from laver_mcore.data.errors import DataError, shortened
from laver_mcore.data.images.source import ImageSource, LoadedImage
from laver_mcore.data.records.values import present

MAX_INLINE_BYTES = 32 * 2**20
"""Longest image inside a record, in base64 characters."""


@dataclass(frozen=True)
class ImageFolder:
    """Where relative image names are looked up; names that lead out of it are refused unless allowed."""

    path: Path
    allow_outside: bool = False

    def find(self, reference: Any, where: str) -> ImageSource:
        """The image that a record means; DataError, kind "image", for one that is not or may not be read."""
        name = _name(reference)
        if name is None:
            raise _refusal(f"{where}: an image must be a file name, not {shortened(str(reference), 60)!r}")
        scheme = name.partition(":")[0].lower() if ":" in name[:8] else ""
        if scheme == "data":
            return _inline(name, where)
        if scheme in ("http", "https"):
            raise _refusal(f"{where}: image {shortened(name)!r} is on the web; download the images first")
        if scheme == "file":
            name = unquote(urlsplit(name).path)
        path = self.path / name
        if not self.allow_outside and not self._holds(path):
            raise _refusal(
                f"{where}: image {shortened(name)!r} lies outside {self.path}; give the folder that holds "
                "the images, or allow_outside_images"
            )
        return path

    @cached_property
    def _absolute(self) -> str:
        return os.path.abspath(self.path)

    def _holds(self, path: Path) -> bool:
        """By the names alone: a link inside the folder may lead anywhere, for its owner has put it there."""
        inside = os.path.abspath(path)
        return inside.startswith(self._absolute.rstrip(os.sep) + os.sep) or inside == self._absolute


def check_exists(image: ImageSource, where: str) -> None:
    """DataError for a path that is no file."""
    try:
        found = not isinstance(image, Path) or image.is_file()
    except (OSError, ValueError):  # a name that no file system takes
        found = False
    if not found:
        raise _refusal(
            f"{where}: image {shortened(str(image), 160)!r} does not exist; check the name and the image folder"
        )


def _name(reference: Any) -> str | None:
    if isinstance(reference, dict):  # {path, bytes}, {url}, {image: path}
        reference = present(reference, "path", "url", "image")
    return reference if isinstance(reference, str) and reference else None


def _inline(uri: str, where: str) -> LoadedImage:
    head, _, encoded = uri.partition(",")
    if not head.endswith(";base64"):
        raise _refusal(f"{where}: image {shortened(head)!r} is a data URI without ';base64'")
    if len(encoded) > MAX_INLINE_BYTES:
        raise _refusal(
            f"{where}: an image of {len(encoded):,} base64 characters, more than {MAX_INLINE_BYTES:,}; "
            "write it to a file"
        )
    try:
        data = base64.b64decode(encoded, validate=True)
    except (binascii.Error, ValueError):
        raise _refusal(f"{where}: image {shortened(uri)!r} is broken base64") from None
    return LoadedImage(f"{where}, {shortened(uri, 40)}", data)


def _refusal(message: str) -> DataError:
    return DataError(message, kind="image")
