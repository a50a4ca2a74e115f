"""One self-contained HTML page: curves with values on hover, tables that sort, pictures inline."""

import base64
import html
from collections.abc import Mapping, Sequence

Rows = Sequence[Mapping[str, float]]

COLOURS = ("#1f5fbf", "#d9822b", "#15803d", "#7c3aed", "#6b7280", "#c81e1e")
STYLE = """body{font:14px sans-serif;max-width:1100px;margin:2em auto;color:#1f2937}
table{border-collapse:collapse;margin:1em 0}td,th{border:1px solid #e5e7eb;padding:.3em .6em;text-align:right}
th{cursor:pointer;background:#f4f4f4}figure{display:inline-block;margin:.5em}img{max-width:100%}
svg{border:1px solid #e5e7eb}circle:hover{stroke:#1f2937;stroke-width:2}"""
SCRIPT = """for (const head of document.querySelectorAll("th")) head.onclick = () => {
  const body = head.closest("table").tBodies[0], column = head.cellIndex;
  const up = head.dataset.up = head.dataset.up === "1" ? "0" : "1";
  const value = row => row.cells[column].dataset.value ?? row.cells[column].textContent;
  const order = (a, b) => (a - b) || String(a).localeCompare(String(b));
  [...body.rows].sort((a, b) => (up === "1" ? 1 : -1) * order(value(a), value(b))).forEach(r => body.append(r));
};"""


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
        parts += ["<h2>Accuracy on changed pictures</h2>", _table(changes, accuracy)]
    for model, rows in models.items():
        columns = list(rows[0])[1:]
        cells = {f"{row['layer']:.0f}": row for row in rows}
        parts += [f"<h2>{html.escape(model)}, by layer</h2>", _table(columns, cells)]
    for title, png in pictures.items():
        data = base64.b64encode(png).decode()
        parts.append(f'<h2>{html.escape(title)}</h2><img alt="" src="data:image/png;base64,{data}">')
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>Diagnosis</title><style>{STYLE}</style>'
        f"<h1>Diagnosis</h1>{''.join(parts)}<script>{SCRIPT}</script></html>"
    )


def _legend(names: Sequence[str]) -> str:
    marks = (
        f'<b style="color:{COLOURS[i % len(COLOURS)]}">{html.escape(name)}</b>'
        for i, name in enumerate(names)
    )
    return " &middot; ".join(marks)


def _table(columns: Sequence[str], rows: Mapping[str, Mapping[str, float]]) -> str:
    head = "".join(f"<th>{html.escape(name.replace('_', ' '))}</th>" for name in ["", *columns])
    body = "".join(
        f"<tr><td>{html.escape(name)}</td>"
        + "".join(f'<td data-value="{row[c]!r}" title="{row[c]!r}">{row[c]:.4g}</td>' for c in columns)
        + "</tr>"
        for name, row in rows.items()
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


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
