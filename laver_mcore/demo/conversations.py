"""What is asked about a demo page, as LLaVA conversations.

No cell of a page is asked twice in one conversation. Otherwise a later answer could be copied from the text
of an earlier one, and the question would no longer need the picture.
"""

import numpy as np
from numpy.typing import NDArray

from laver_mcore.demo.pages import CELLS_PER_SIDE, Page

IMAGE_PLACEHOLDER = "<image>"
Turns = list[tuple[str, str]]


def _spaced(digits: NDArray[np.int64]) -> str:
    return " ".join(str(digit) for digit in digits)


def caption_turns(page: Page) -> Turns:
    """Stage 1: read the whole page out, row by row, or name the photograph."""
    if page.digits is None:
        return [("Describe the picture.", str(page.caption))]
    return [("Read the page.", "\n".join(_spaced(row) for row in page.digits))]


def vague_turns(page: Page) -> Turns:
    """A caption as web pages have them: it says what kind of picture it is, and names no digit."""
    return [("Describe the picture.", page.caption or "a page of handwritten digits")]


def line_turns(page: Page, rng: np.random.Generator) -> Turns:
    """Ask for all three rows, or all three columns, in random order."""
    if page.digits is None:
        return _photograph_turns(page)
    by_row = bool(rng.integers(2))
    lines, name = (page.digits, "row") if by_row else (page.digits.T, "column")
    order = rng.permutation(CELLS_PER_SIDE)
    return [(f"Which digits are in {name} {line + 1}?", _spaced(lines[line])) for line in order]


def dense_turns(page: Page, rng: np.random.Generator) -> Turns:
    """Stage 2: as `line_turns` or as `mixed_turns`, evenly."""
    return line_turns(page, rng) if rng.integers(2) else mixed_turns(page, rng)


def mixed_turns(page: Page, rng: np.random.Generator) -> Turns:
    """Stage 3 and held-out pages: one row or column, then two single cells outside it."""
    if page.digits is None:
        return _photograph_turns(page)
    by_row = bool(rng.integers(2))
    line = int(rng.integers(CELLS_PER_SIDE))
    asked = page.digits[line] if by_row else page.digits[:, line]
    turns = [(f"Which digits are in {'row' if by_row else 'column'} {line + 1}?", _spaced(asked))]
    others = [cell for cell in np.ndindex(page.digits.shape) if cell[0 if by_row else 1] != line]
    for choice in rng.choice(len(others), size=2, replace=False):
        row, column = others[choice]
        turns.append(
            (f"Which digit is in row {row + 1}, column {column + 1}?", str(page.digits[row, column]))
        )
    return turns


def _photograph_turns(page: Page) -> Turns:
    return [
        ("What does the photograph show?", str(page.caption)),
        ("Is it in colour?", "yes" if page.in_colour else "no"),
    ]


def llava_record(key: str, image: str, turns: Turns) -> dict[str, object]:
    """Return one LLaVA record: `id`, `image` (path beside the JSON file) and `conversations`."""
    conversations = []
    for index, (question, answer) in enumerate(turns):
        prefix = f"{IMAGE_PLACEHOLDER}\n" if index == 0 else ""
        conversations.append({"from": "human", "value": prefix + question})
        conversations.append({"from": "gpt", "value": answer})
    return {"id": key, "image": image, "conversations": conversations}
