"""Pieces of a self-contained HTML page: curves with values on hover, tables that sort, pictures inline."""

import base64
import html
from collections.abc import Mapping, Sequence
from statistics import fmean

COLOURS = ("#1f5fbf", "#d9822b", "#15803d", "#7c3aed", "#6b7280", "#c81e1e", "#0e7490")
_STYLE = """body{font:14px sans-serif;max-width:1100px;margin:2em auto;color:#1f2937}
table{border-collapse:collapse;margin:1em 0}td,th{border:1px solid #e5e7eb;padding:.3em .6em;text-align:right}
th{cursor:pointer;background:#f4f4f4}figure{display:inline-block;margin:.5em}img{max-width:100%}
svg{border:1px solid #e5e7eb}rect:hover{stroke:#1f2937;stroke-width:2}
circle{opacity:0}circle:hover{opacity:1;stroke:#1f2937;stroke-width:2}
.few circle{opacity:1}pre{white-space:pre-wrap;background:#f4f4f4;padding:.6em}mark{background:#b6e3b6}
.bar{display:flex;height:14px;background:#ddd}.bar div{box-sizing:border-box;border-right:1px solid #fff}"""
_SCRIPT = """for (const head of document.querySelectorAll("th")) head.onclick = () => {
  const body = head.closest("table").tBodies[0], column = head.cellIndex;
  const up = head.dataset.up = head.dataset.up === "1" ? "0" : "1";
  const value = row => row.cells[column].dataset.value ?? row.cells[column].textContent;
  const order = (a, b) => (a - b) || String(a).localeCompare(String(b));
  [...body.rows].sort((a, b) => (up === "1" ? 1 : -1) * order(value(a), value(b))).forEach(r => body.append(r));
};"""
_FEW = 40
_POINTS = 300


def document(title: str, parts: Sequence[str]) -> str:
    """The whole page."""
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{_STYLE}</style><h1>{html.escape(title)}</h1>{''.join(parts)}<script>{_SCRIPT}</script></html>"
    )


def heading(text: str) -> str:
    """The title of a section."""
    return f"<h2>{html.escape(text)}</h2>"


def legend(names: Sequence[str]) -> str:
    """Names in the colours of their curves."""
    marks = (
        f'<b style="color:{COLOURS[i % len(COLOURS)]}">{html.escape(name)}</b>'
        for i, name in enumerate(names)
    )
    return f"<p>{' &middot; '.join(marks)}</p>"


def table(columns: Sequence[str], rows: Mapping[str, Mapping[str, float | str]], first: str = "") -> str:
    """Rows by name, which `first` heads; numbers to four digits, the whole number on hover."""
    head = "".join(f"<th>{html.escape(name.replace('_', ' '))}</th>" for name in [first, *columns])
    body = "".join(
        f"<tr><td>{html.escape(name)}</td>{''.join(_cell(row[column]) for column in columns)}</tr>"
        for name, row in rows.items()
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _cell(value: float | str) -> str:
    if isinstance(value, str):
        return f"<td>{html.escape(value)}</td>"
    shown = f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
    return f'<td data-value="{value!r}" title="{value!r}">{shown}</td>'


def image(encoded: bytes, title: str = "", kind: str = "png") -> str:
    """A picture inside the page."""
    data, name = base64.b64encode(encoded).decode(), html.escape(title)
    return f'<img alt="{name}" title="{name}" src="data:image/{kind};base64,{data}">'


Series = Sequence[tuple[float, float]]


def chart(name: str, curves: Mapping[str, Series], along: str, width: int = 340, height: int = 180) -> str:
    """`curves` (name -> points x, y) over `along`, their values on hover; long ones as means of neighbours."""
    shown = {curve: _thinned(points) for curve, points in curves.items() if points}
    if not shown:
        return ""
    (left, right), (low, high) = (
        (min(values), max(values))
        for values in zip(*(p for points in shown.values() for p in points), strict=True)
    )
    lines = []
    for index, (curve, points) in enumerate(shown.items()):
        colour = COLOURS[index % len(COLOURS)]
        places = [
            (
                20 + (width - 40) * (x - left) / ((right - left) or 1.0),
                height - 20 - (height - 40) * (y - low) / ((high - low) or 1.0),
            )
            for x, y in points
        ]
        drawn = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        lines.append(f'<polyline fill="none" stroke="{colour}" points="{drawn}"/>')
        for (x, y), (at, value) in zip(places, points, strict=True):
            title = f"{html.escape(curve)}, {html.escape(along)} {at:g}: {value:.4g}"
            lines.append(
                f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{colour}"><title>{title}</title></circle>'
            )
    caption = f"{html.escape(name.replace('_', ' '))} by {html.escape(along)}, {low:.3g} to {high:.3g}"
    few = ' class="few"' if max(map(len, shown.values())) <= _FEW else ""
    svg = f'<svg{few} width="{width}" height="{height}">{"".join(lines)}</svg>'
    return f"<figure>{svg}<figcaption>{caption}</figcaption></figure>"


def _thinned(points: Series) -> Series:
    """At most so many points as can be told apart: each the mean of neighbours."""
    size = -(-len(points) // _POINTS)
    groups = [points[start : start + size] for start in range(0, len(points), size)] if size > 1 else []
    return [(fmean(x for x, _ in group), fmean(y for _, y in group)) for group in groups] or points


def bar(shares: Mapping[str, float]) -> str:
    """What makes up a whole, side by side, named and shared out on hover."""
    whole = sum(shares.values()) or 1.0
    parts = "".join(
        f'<div style="flex:{value / whole:.6f};background:{COLOURS[i % len(COLOURS)]}" '
        f'title="{html.escape(name)}: {value / whole:.1%}"></div>'
        for i, (name, value) in enumerate(shares.items())
    )
    return f'<div class="bar">{parts}</div>'


def bars(caption: str, counts: Mapping[str, int], width: int = 340, height: int = 140) -> str:
    """A bar for each count, its name and number on hover."""
    top, step = max(counts.values(), default=0) or 1, width / max(1, len(counts))
    drawn = "".join(
        f'<rect x="{i * step:.1f}" y="{height * (1 - count / top):.1f}" width="{max(1.0, step - 1):.1f}" '
        f'height="{height * count / top:.1f}" fill="{COLOURS[0]}"><title>{html.escape(name)}: {count:,}</title></rect>'
        for i, (name, count) in enumerate(counts.items())
    )
    ends = f"{next(iter(counts), '')} to {list(counts)[-1] if counts else ''}"
    svg = f'<svg width="{width}" height="{height}">{drawn}</svg>'
    return f"<figure>{svg}<figcaption>{html.escape(f'{caption}, {ends}')}</figcaption></figure>"
