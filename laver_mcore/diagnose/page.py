"""The report of a diagnosis as one page: curves with values on hover, tables, pictures."""

import html
from collections.abc import Mapping, Sequence

from laver_mcore.web_page import document, picture, table

Rows = Sequence[Mapping[str, float]]

COLOURS = ("#1f5fbf", "#d9822b", "#15803d", "#7c3aed", "#6b7280", "#c81e1e")


def page(
    models: Mapping[str, Rows], accuracy: Mapping[str, Mapping[str, float]], pictures: Mapping[str, bytes]
) -> str:
    """The report of `models` (name -> one row per layer), their `accuracy` by change, and PNG `pictures` by title."""
    names = [
        name for name in next(iter(models.values()))[0] if name != "layer" and not name.startswith("head_")
    ]
    parts = [f"<p>{_legend(list(models))}</p>", *(_chart(name, models) for name in names)]
    changes = list(next(iter(accuracy.values()), {}))
    if changes:
        parts += ["<h2>Accuracy on changed pictures</h2>", table(changes, accuracy)]
    for model, rows in models.items():
        columns = list(rows[0])[1:]
        cells = {f"{row['layer']:.0f}": row for row in rows}
        parts += [f"<h2>{html.escape(model)}, by layer</h2>", table(columns, cells)]
    for title, png in pictures.items():
        parts.append(f"<h2>{html.escape(title)}</h2>{picture(png)}")
    return document("Diagnosis", parts)


def _legend(names: Sequence[str]) -> str:
    marks = (
        f'<b style="color:{COLOURS[i % len(COLOURS)]}">{html.escape(name)}</b>'
        for i, name in enumerate(names)
    )
    return " &middot; ".join(marks)


def _chart(name: str, models: Mapping[str, Rows], width: int = 340, height: int = 180) -> str:
    """A measure over layers, one line per model."""
    values = [row[name] for rows in models.values() for row in rows]
    low, high = min(values), max(values)
    lines = []
    for index, (model, rows) in enumerate(models.items()):
        colour = COLOURS[index % len(COLOURS)]
        xs = [20 + (width - 40) * i / max(1, len(rows) - 1) for i in range(len(rows))]
        ys = [height - 20 - (height - 40) * (row[name] - low) / ((high - low) or 1.0) for row in rows]
        points = " ".join(f"{x:.1f},{y:.1f}" for x, y in zip(xs, ys, strict=True))
        lines.append(f'<polyline fill="none" stroke="{colour}" points="{points}"/>')
        for x, y, row in zip(xs, ys, rows, strict=True):
            title = f"{html.escape(model)}, layer {row['layer']:.0f}: {row[name]:.4g}"
            lines.append(
                f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{colour}"><title>{title}</title></circle>'
            )
    caption = f"{html.escape(name.replace('_', ' '))} by layer, {low:.3g} to {high:.3g}"
    svg = f'<svg width="{width}" height="{height}">{"".join(lines)}</svg>'
    return f"<figure>{svg}<figcaption>{caption}</figcaption></figure>"
