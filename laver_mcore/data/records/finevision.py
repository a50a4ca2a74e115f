"""FineVision's rows: questions and answers without placeholders, each turn rated from 1 to 5 by a judge.

Columns as published: `images`, `texts` [{user, assistant}], `source`, and for each of `RATINGS` a list
`<name>_ratings` with one value a turn and `<name>_min` over them.
"""

from dataclasses import dataclass
from typing import Any

from laver_mcore.data.errors import DataError
from laver_mcore.data.records.sample import Turn, typed_turn
from laver_mcore.data.records.values import present

RATINGS = ("relevance", "visual_dependency", "image_correspondence", "formatting")


@dataclass(frozen=True, kw_only=True)
class RatingFilter:
    """Lowest rating (1 to 5) that a turn needs to be kept.

    None keeps all. A turn without a rating is kept.
    """

    relevance: int | None = None
    visual_dependency: int | None = None
    image_correspondence: int | None = None
    formatting: int | None = None

    def keeps(self, ratings: dict[str, int | None]) -> bool:
        """Whether a turn with these ratings stays."""
        for name in RATINGS:
            wanted, got = getattr(self, name), ratings.get(name)
            if wanted is not None and got is not None and got < wanted:
                return False
        return True


def is_finevision(record: dict[str, Any]) -> bool:
    """Whether a row is FineVision's."""
    return present(record, "texts") is not None


def turn_ratings(record: dict[str, Any], turn: int) -> dict[str, int | None]:
    """The ratings of one question and answer; None where the row gives none."""
    found: dict[str, int | None] = {}
    for name in RATINGS:
        values = record.get(f"{name}_ratings") or []
        found[name] = values[turn] if turn < len(values) else None
    return found


def kept_turns(record: dict[str, Any], ratings: RatingFilter) -> list[int]:
    """Numbers of the questions that pass the filter."""
    return [n for n in range(len(record["texts"])) if ratings.keeps(turn_ratings(record, n))]


def finevision_turns(
    record: dict[str, Any], num_images: int, ratings: RatingFilter, where: str
) -> tuple[Turn, ...]:
    """The turns of a row, its images in front of the first question that is kept.

    Raises DataError when the row holds no text, or when the filter leaves none.
    """
    texts = record["texts"]
    if not isinstance(texts, list) or not texts:
        raise DataError(f"{where}: 'texts' is empty; give at least one {{user, assistant}}")
    kept = kept_turns(record, ratings)
    if not kept:
        raise DataError(f"{where}: no turn passes the rating filter", kind="filtered")
    turns = []
    for position, number in enumerate(kept):
        turn = texts[number] if isinstance(texts[number], dict) else {}
        user, assistant = turn.get("user"), turn.get("assistant")
        if not isinstance(user, str) or not isinstance(assistant, str):
            raise DataError(f"{where}: texts[{number}] lacks user or assistant")
        # Typed, because a question may quote "<image>".
        images = num_images if position == 0 else 0
        turns += [typed_turn("user", behind_images(images, user)), Turn("assistant", assistant)]
    return tuple(turns)


def behind_images(num_images: int, text: str) -> list[str]:
    """LLaVA's form: each image on a line of its own, then the question."""
    if not num_images:
        return [text]
    return ["", *["\n"] * (num_images - 1), "\n" + text]
