"""A survey as one HTML page."""

import html
from collections.abc import Sequence

import numpy as np

from laver_mcore.data.prepare.survey import Survey
from laver_mcore.page import bars, document, image, table

_BINS = 24
_QUANTILES = {"least": 0, "a tenth": 10, "median": 50, "nine tenths": 90, "most": 100}


def survey_page(name: str, found: Survey, *, text_unit: str) -> str:
    """The page about a set called `name`; `text_unit` is what text lengths count, tokens or characters."""
    good = sum(found.kinds.values())
    bad = sum(reason.count for reason in found.reasons.values())
    parts = [f"<p>{found.num_records:,} records: {good:,} samples, {bad:,} rejected.</p><h2>Samples</h2>"]
    parts.append(
        table(["samples"], {kind: {"samples": n} for kind, n in sorted(found.kinds.items())}, "kind")
    )
    parts += _lengths(found, text_unit)
    parts += _rejects(found)
    parts += _duplicates(found)
    return document(f"Data set {name}", parts)


def _lengths(found: Survey, text_unit: str) -> list[str]:
    sides = np.array(found.sizes, dtype=np.int64).reshape(-1, 2)
    measured: dict[str, np.ndarray] = {
        "image width, pixels": sides[:, 0],
        "image height, pixels": sides[:, 1],
        "image area, megapixels": sides.prod(axis=1) / 1e6,
        "image aspect, width / height": sides[:, 0] / np.maximum(1, sides[:, 1]),
        f"text, {text_unit} a sample": np.array(found.text_lengths),
    }
    if found.visual_tokens:
        measured["visual tokens a sample"] = np.array(found.visual_tokens)
        measured["tokens a sample"] = np.array(found.text_lengths) + np.array(found.visual_tokens)
    measured = {name: values for name, values in measured.items() if len(values)}
    rows = {name: _quantiles(values) for name, values in measured.items()}
    return [
        "<h2>Sizes and lengths</h2>",
        table(list(_QUANTILES), rows),
        *(bars(name, _histogram(values)) for name, values in measured.items()),
    ]


def _quantiles(values: np.ndarray) -> dict[str, float | str]:
    kind = int if values.dtype.kind == "i" else float
    return {name: kind(np.percentile(values, q, method="nearest")) for name, q in _QUANTILES.items()}


def _histogram(values: np.ndarray) -> dict[str, int]:
    """Counts in bins of equal ratio, for sizes span decades; of equal width where some value is 0."""
    low, high = float(values.min()), float(values.max())
    if low == high:
        return {f"{low:.4g}": len(values)}
    edges = np.geomspace(low, high, _BINS + 1) if low > 0 else np.linspace(low, high, _BINS + 1)
    edges[0], edges[-1] = low, high
    counts, _ = np.histogram(values, edges)
    return {f"{edges[i]:.4g} to {edges[i + 1]:.4g}": int(n) for i, n in enumerate(counts)}


def _rejects(found: Survey) -> list[str]:
    parts = ["<h2>Rejected</h2>"]
    for reason in sorted(found.reasons.values(), key=lambda reason: -reason.count):
        shown = "".join(image(encoded, text, "jpeg") for text, encoded in reason.pictures)
        shown = shown or "<small>no picture of it can be shown</small>"
        title = html.escape(f"{reason.count:,} x {reason.kind}: {reason.example}")
        parts.append(f"<h3>{title}</h3><p>{shown}</p>")
    return parts if found.reasons else [*parts, "<p>none</p>"]


def _duplicates(found: Survey) -> list[str]:
    rows = {
        "images with the same bytes": _repeated(list(found.images_seen.values())),
        "samples with the same text and images": _repeated(list(found.samples_seen.values())),
    }
    shown = [
        image(found.thumbnails[name], f"{found.images_seen[name]:,} times, blake2b {name}", "jpeg")
        for name in sorted(found.thumbnails, key=lambda name: -found.images_seen[name])
        if found.thumbnails[name]
    ]
    return ["<h2>Duplicates</h2>", table(list(next(iter(rows.values()))), rows), *shown]


def _repeated(counts: Sequence[int]) -> dict[str, float | str]:
    repeated = [count for count in counts if count > 1]
    return {
        "different": len(counts),
        "there more than once": len(repeated),
        "could be left out": sum(repeated) - len(repeated),
        "most often": max(counts, default=0),
    }
