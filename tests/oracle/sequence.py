"""Where a token stands and what it sees, token by token."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Row:
    """One row of a packed sequence; document and image are numbered through it, None is no image."""

    document: int
    image: int | None
    position: tuple[int, int, int]


def dialogue(document_lengths, visual_rows, image_grids) -> list[Row]:
    """Text stands at p = previous maximum + 1 on every axis, patch (r, c) at (p, p + r, p + c)."""
    image_at, start_of = {}, {}
    place = 0
    for image, (height, width) in enumerate(image_grids):
        for index in range(height * width):
            row = visual_rows[place + index]
            image_at[row], start_of[row] = image, (index // width, index % width)
        place += height * width
    rows: list[Row] = []
    for document, length in enumerate(document_lengths):
        p, base, current = 0, 0, None
        for at in range(len(rows), len(rows) + length):
            image = image_at.get(at)
            if image is None:
                rows.append(Row(document, None, (p, p, p)))
                p += 1
            else:
                if image != current:
                    base, p = p, p + max(image_grids[image])
                r, c = start_of[at]
                rows.append(Row(document, image, (base, base + r, base + c)))
            current = image
    return rows


def reconstruction(image_grids) -> list[Row]:
    """Every image is a document of its own; patch (r, c) stands at (0, r, c)."""
    return [
        Row(image, image, (0, r, c))
        for image, (height, width) in enumerate(image_grids)
        for r in range(height)
        for c in range(width)
    ]


def allowed(rows: list[Row], *, mixed: bool) -> torch.Tensor:
    """Bool [S, S]: row i sees row j."""
    return torch.tensor(
        [
            [
                a.document == b.document
                and (j <= i or (mixed and a.image is not None and a.image == b.image))
                for j, b in enumerate(rows)
            ]
            for i, a in enumerate(rows)
        ]
    )


def positions(rows: list[Row], *, two_dimensional: bool) -> torch.Tensor:
    """Int [S, 3]: (t, row, column), or the place in the document on every axis."""
    if two_dimensional:
        return torch.tensor([row.position for row in rows])
    counts: dict[int, int] = {}
    found = []
    for row in rows:
        place = counts.get(row.document, 0)
        counts[row.document] = place + 1
        found.append((place, place, place))
    return torch.tensor(found)
