"""The page of a diagnosis: measures by layer, accuracies on changed pictures, and what the models look at."""

from collections.abc import Mapping, Sequence

from laver_mcore import page as html

Rows = Sequence[Mapping[str, float]]


def page(
    models: Mapping[str, Rows], accuracy: Mapping[str, Mapping[str, float]], pictures: Mapping[str, bytes]
) -> str:
    """The report of `models` (name -> one row per layer), their `accuracy` by change, and PNG `pictures` by title."""
    first = next(iter(models.values()))[0]
    names = [name for name in first if name != "layer" and not name.startswith("head_")]
    parts = [html.legend(list(models))]
    for name in names:
        curves = {model: [(row["layer"], row[name]) for row in rows] for model, rows in models.items()}
        parts.append(html.chart(name, curves, "layer"))
    changes = list(next(iter(accuracy.values()), {}))
    if changes:
        parts += [html.heading("Accuracy on changed pictures"), html.table(changes, accuracy)]
    for model, rows in models.items():
        cells = {f"{row['layer']:.0f}": row for row in rows}
        parts += [html.heading(f"{model}, by layer"), html.table(list(rows[0])[1:], cells)]
    for title, png in pictures.items():
        parts += [html.heading(title), html.image(png)]
    return html.document("Diagnosis", parts)
