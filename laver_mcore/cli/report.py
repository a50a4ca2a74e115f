"""A run as one web page: its curves, where the time went, what it saw, its checkpoints and recipe.

    laver report runs/mine
    laver report runs/mine runs/baseline --output compare.html

Several runs share the charts. The page needs no other file. Samples with their masks are those of the last iteration,
recomputed from the recipe; where the data are gone the page says so.
"""

import argparse
import json
from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import Any

from laver_mcore import page as html
from laver_mcore.cli.console import refuse
from laver_mcore.config.errors import ConfigError
from laver_mcore.config.flags import FlagParser, file_to_write

Rows = list[dict[str, Any]]

_OWN_SECTIONS = ("iteration", "step_seconds", "skipped")
_LISTED = 200
_TIME = ("data", "vision", "teacher", "student", "optimizer", "ema", "other")


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = FlagParser(__doc__)
    parser.add_argument("run", nargs="+", type=Path, metavar="RUN", help="--save folder of a run")
    parser.add_argument(
        "--output", type=file_to_write, help="HTML file to write; default: report.html in the first run"
    )
    parser.add_argument("--no-samples", action="store_true", help="leave out what the last iteration saw")
    return parser.parse_args(argv)


def read_rows(run: Path) -> Rows:
    """The metrics of a run; `ConfigError` where there are none. A last line that was cut off is left out."""
    try:
        lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ConfigError(
            f"{run} holds no metrics.jsonl ({error.strerror}); give the --save folder of a run"
        ) from None
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            if number < len(lines):
                raise ConfigError(f"{run}/metrics.jsonl, line {number} is no JSON") from None
    if not rows:
        raise ConfigError(f"{run}/metrics.jsonl is empty: the run has not finished an iteration")
    return rows


def summary(rows: Rows) -> dict[str, float | str]:
    """What a run comes to, in a line of a table."""
    steps = [
        after["iteration"] - before
        for before, after in zip([0, *(r["iteration"] for r in rows)], rows, strict=False)
    ]
    seconds = [row["step_seconds"] * n for row, n in zip(rows, steps, strict=True)]
    tokens = sum(row["tokens_per_second"] * each for row, each in zip(rows, seconds, strict=True))
    losses = [row["loss"] for row in rows if row["loss"] is not None]
    found: dict[str, float | str] = {
        "iterations": rows[-1]["iteration"],
        "hours": sum(seconds) / 3600,
        "tokens": round(tokens),
        "tokens/s": tokens / sum(seconds),
        "padding": sum(row["padding_share"] * each for row, each in zip(rows, seconds, strict=True))
        / sum(seconds),
        "last loss": losses[-1] if losses else "none",
        "lowest loss": min(losses) if losses else "none",
        "skipped steps": rows[-1]["skipped"],
    }
    accuracies = [row["valid_accuracy"] for row in rows if row.get("valid_accuracy") is not None]
    return found | ({"best held-out accuracy": max(accuracies)} if accuracies else {})


def curves(runs: dict[str, Rows]) -> Iterator[str]:
    """A chart for each column that any run has numbers in."""
    columns = dict.fromkeys(name for rows in runs.values() for name in rows[-1])
    for column in columns:
        if column in _OWN_SECTIONS or column.startswith("time_"):
            continue
        points = {
            run: [(row["iteration"], row[column]) for row in rows if row.get(column) is not None]
            for run, rows in runs.items()
        }
        yield html.chart(column, points, "iteration")


def where_time_went(rows: Rows) -> list[str]:
    """Shares of a step's time, the first line (in which things start) aside."""
    later = rows[1:] or rows
    means = {part: sum(row[f"time_{part}_ms"] for row in later) / len(later) for part in _TIME}
    whole = sum(means.values()) or 1.0
    shown = {part: {"ms a step": value, "share": value / whole} for part, value in means.items()}
    return [html.legend(_TIME), html.bar(means), html.table(["ms a step", "share"], shown)]


def files_of(run: Path) -> Iterator[str]:
    """Checkpoints, and samples that were left out or skipped."""
    from laver_mcore.megatron.intact import saved_iterations, tracked_iteration

    saved = ", ".join(f"{iteration:,}" for iteration in saved_iterations(run)) or "none"
    yield f"<p>Checkpoints: {saved}; a resume takes {tracked_iteration(run) or 'none'}.</p>"
    for name, what in (
        ("quarantine.jsonl", "samples left out"),
        ("skipped.jsonl", "skipped steps, by sample"),
    ):
        if (run / name).is_file():
            lines = (run / name).read_text(encoding="utf-8").splitlines()
            yield _folded(f"{len(lines):,} {what}", "\n".join(lines[:_LISTED]))
    if (run / "config.yaml").is_file():
        recipe = (run / "config.yaml").read_text(encoding="utf-8")
        yield _folded("Recipe", recipe)


def _folded(summary: str, text: str) -> str:
    return f"<details><summary>{escape(summary)}</summary><pre>{escape(text)}</pre></details>"


def samples(run: Path, iteration: int) -> Iterator[str]:
    """What the first micro-batch of an iteration held, masks and all."""
    from laver_mcore.cli.inspect_data import step_html
    from laver_mcore.config.load import from_recipe, resolve
    from laver_mcore.data.errors import DataError
    from laver_mcore.train.build import build_data, build_tokenizer

    try:
        config = resolve(from_recipe(run / "config.yaml"))
        data = build_data(config, build_tokenizer(config))
        yield from step_html(config, data, iteration - 1, micro_batches=1)
    except (ConfigError, DataError, OSError) as error:
        yield f"<p>What iteration {iteration} saw cannot be shown: {escape(str(error))}</p>"


def page(runs: list[Path], *, with_samples: bool) -> str:
    """The whole page."""
    names = [str(run) for run in runs]
    rows = {name: read_rows(run) for name, run in zip(names, runs, strict=True)}
    found = {name: summary(of_run) for name, of_run in rows.items()}
    columns = list(dict.fromkeys(column for of_run in found.values() for column in of_run))
    found = {name: {column: of_run.get(column, "") for column in columns} for name, of_run in found.items()}
    parts = [html.table(columns, found), html.legend(names), *curves(rows)]
    for name, run in zip(names, runs, strict=True):
        parts += [
            html.heading(f"Where the time of {name} went"),
            *where_time_went(rows[name]),
            *files_of(run),
        ]
    if with_samples:
        parts += samples(runs[0], rows[names[0]][-1]["iteration"])
    return html.document(" and ".join(names), parts)


def main(argv: list[str]) -> int:
    """Returns the exit status: 0, or 2 for a folder that holds no run."""
    args = parse(argv)
    output = args.output or args.run[0] / "report.html"
    try:
        text = page(args.run, with_samples=not args.no_samples)
        output.write_text(text, encoding="utf-8")
    except ConfigError as error:
        return refuse(error)
    except OSError as error:
        return refuse(f"{output} cannot be written ({error.strerror})")
    print(f"{output}: {len(text) / 2**20:.1f} MiB")
    return 0
