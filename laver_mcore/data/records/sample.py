"""One typed sample: what every record, row and prepared shard becomes."""

from collections.abc import Sequence
from dataclasses import dataclass

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


def make_sample(key: str, turns: tuple[Turn, ...], images: Sequence[ImageSource], where: str) -> Sample:
    """A `Sample`; DataError when its turns have not one place for each image, or its text is no Unicode."""
    num_placeholders = sum([turn.num_images for turn in turns])
    if num_placeholders != len(images):
        raise DataError(
            f"{where}: {num_placeholders} {IMAGE_PLACEHOLDER} placeholder(s) in the user turns but "
            f"{len(images)} image(s); write one {IMAGE_PLACEHOLDER} per image"
        )
    for text in (key, *(turn.text for turn in turns)):
        _check_unicode(text, where)
    return Sample(key=key, turns=turns, images=tuple(images))


def _check_unicode(text: str, where: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        found = f"U+{ord(text[error.start]):04X}"
        raise DataError(
            f"{where}: {found} at character {error.start} is half of a surrogate pair, which no tokenizer "
            "can read; cut the text between characters"
        ) from None
