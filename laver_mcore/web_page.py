"""One self-contained HTML page: tables that sort, bars with values on hover, pictures inline."""

import base64
import html
from collections.abc import Iterable, Mapping, Sequence

Value = float | int | str

STYLE = """body{font:14px sans-serif;max-width:1100px;margin:2em auto;color:#1f2937}
table{border-collapse:collapse;margin:1em 0}td,th{border:1px solid #e5e7eb;padding:.3em .6em;text-align:right}
th{cursor:pointer;background:#f4f4f4}figure{display:inline-block;margin:.5em}img{max-width:100%}
svg{border:1px solid #e5e7eb}circle:hover,rect:hover{stroke:#1f2937;stroke-width:2}"""
SCRIPT = """for (const head of document.querySelectorAll("th")) head.onclick = () => {
  const body = head.closest("table").tBodies[0], column = head.cellIndex;
  const up = head.dataset.up = head.dataset.up === "1" ? "0" : "1";
  const value = row => row.cells[column].dataset.value ?? row.cells[column].textContent;
  const order = (a, b) => (a - b) || String(a).localeCompare(String(b));
  [...body.rows].sort((a, b) => (up === "1" ? 1 : -1) * order(value(a), value(b))).forEach(r => body.append(r));
};"""


def document(title: str, parts: Iterable[str]) -> str:
    """The whole page; `parts` are HTML, `title` is text."""
    name = html.escape(title)
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{name}</title><style>{STYLE}</style>'
        f"<h1>{name}</h1>{''.join(parts)}<script>{SCRIPT}</script></html>"
    )


def table(columns: Sequence[str], rows: Mapping[str, Mapping[str, Value]], first: str = "") -> str:
    """A table that sorts by the column that is clicked; `first` heads the rows' names."""
    head = "".join(f"<th>{html.escape(name.replace('_', ' '))}</th>" for name in [first, *columns])
    body = "".join(
        f"<tr><td>{html.escape(name)}</td>{''.join(_cell(row[column]) for column in columns)}</tr>"
        for name, row in rows.items()
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _cell(value: Value) -> str:
    if isinstance(value, str):
        return f"<td>{html.escape(value)}</td>"
    shown = f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
    return f'<td data-value="{value!r}" title="{value!r}">{shown}</td>'


def picture(image: bytes, title: str = "", kind: str = "png") -> str:
    """An encoded image inline."""
    data = base64.b64encode(image).decode()
    name = html.escape(title)
    return f'<img alt="{name}" title="{name}" src="data:image/{kind};base64,{data}">'


def bars(caption: str, counts: Mapping[str, int], width: int = 340, height: int = 140) -> str:
    """A bar for each count, its name and number on hover."""
    top, step = max(counts.values(), default=0) or 1, width / max(1, len(counts))
    drawn = "".join(
        f'<rect x="{i * step:.1f}" y="{height * (1 - count / top):.1f}" width="{max(1.0, step - 1):.1f}" '
        f'height="{height * count / top:.1f}" fill="#1f5fbf"><title>{html.escape(name)}: {count:,}</title></rect>'
        for i, (name, count) in enumerate(counts.items())
    )
    ends = f"{next(iter(counts), '')} to {list(counts)[-1] if counts else ''}"
    svg = f'<svg width="{width}" height="{height}">{drawn}</svg>'
    return f"<figure>{svg}<figcaption>{html.escape(f'{caption}, {ends}')}</figcaption></figure>"
