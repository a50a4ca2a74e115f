"""The report's picture: one figure with curves by stage, an accuracy bar chart and sample pages."""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.offsetbox import AnchoredOffsetbox, HPacker, TextArea
from PIL import Image

from laver_mcore.demo.results import Answer, Stage, spread

RUN_COLOURS = ("#1f5fbf", "#d9822b", "#6b7280", "#7c3aed")
RIGHT, WRONG, INK, FAINT, GRID = "#15803d", "#c81e1e", "#1f2937", "#6b7280", "#e5e7eb"
MASK, MOMENTUM = "#0f766e", "#b45309"
CHARTS = (
    ("lm_loss", "Language-model loss", True),
    ("mim_loss", "Masked visual tokens: latent loss", False),
    ("gram_loss", "Gram loss", False),
    ("visual_similarity", "Similarity of an image's visual tokens", False),
    ("teacher_distance", "Distance the teacher has moved", False),
)
"""Metric, title, logarithmic axis."""
NUM_SAMPLES = 12
SAMPLE_COLUMNS = 6


def draw_report(
    path: Path, stages: dict[str, list[Stage]], answers: list[Answer], summary: dict[str, Any]
) -> None:
    """Draw everything and write one PNG (about 1,700 pixels wide)."""
    samples = spread(answers, NUM_SAMPLES)
    sample_rows = -(-len(samples) // SAMPLE_COLUMNS)
    heights = [6.6, 0.4 + 3.35 * sample_rows]
    figure = Figure(figsize=(15.5, sum(heights)), dpi=110, facecolor="white", layout="constrained")
    parts: Any = figure.subfigures(2, 1, height_ratios=heights)
    curves, pages = parts
    _draw_curves(curves, stages, summary)
    _draw_samples(pages, samples, sample_rows, next(iter(stages)))
    figure.savefig(path)


def _draw_curves(figure: SubFigure, stages: dict[str, list[Stage]], summary: dict[str, Any]) -> None:
    axes = list(np.ravel(figure.subplots(2, 4)))
    for axis, (metric, title, logarithmic) in zip(axes, CHARTS, strict=False):
        _draw_metric(axis, stages, metric, RUN_COLOURS)
        _finish(axis, title, stages)
        if logarithmic and axis.lines:
            axis.set_yscale("log")
    schedules, rate, accuracy = axes[len(CHARTS) :]
    _draw_schedules(schedules, stages)
    _draw_metric(rate, stages, "learning_rate", RUN_COLOURS)
    _finish(rate, "Learning rate", stages)
    rate.yaxis.set_major_formatter(lambda value, _: f"{value:.2g}")
    _draw_accuracy(accuracy, next(iter(stages)), summary)
    axes[0].legend(frameon=False, fontsize=9, loc="upper right", bbox_to_anchor=(1.0, 0.94))


def _draw_schedules(axis: Axes, stages: dict[str, list[Stage]]) -> None:
    """Mask ratio on the left axis, momentum on the right one, of the first run alone."""
    first = dict([next(iter(stages.items()))])
    _draw_metric(axis, first, "mask_ratio", (MASK,))
    _finish(axis, "Mask ratio and teacher momentum", stages)
    axis.tick_params(axis="y", colors=MASK)
    momentum = axis.twinx()
    _draw_metric(momentum, first, "momentum", (MOMENTUM,), linestyle=(0, (4, 2)))
    momentum.spines[:].set_visible(False)
    momentum.tick_params(axis="y", colors=MOMENTUM, labelsize=8, length=0)


def _draw_metric(
    axis: Axes,
    stages: dict[str, list[Stage]],
    metric: str,
    colours: tuple[str, ...],
    linestyle: Any = "-",
) -> None:
    """Plot one metric of every run, its stages one after another on one axis of steps."""
    for number, (run, members) in enumerate(stages.items()):
        colour, start, label = colours[number % len(colours)], 0, run
        for stage in members:
            iterations, values = stage.series(metric)
            steps = [start + iteration for iteration in iterations]
            start += stage.last_iteration
            if not steps:
                continue
            smooth = _smooth(values)
            if not np.allclose(smooth, values):
                axis.plot(steps, values, color=colour, alpha=0.18, linewidth=0.8, label="_raw")
            axis.plot(steps, smooth, color=colour, linewidth=1.8, linestyle=linestyle, label=label)
            label = "_later stage"
    if not axis.lines:
        axis.text(0.5, 0.5, "not logged", transform=axis.transAxes, ha="center", color=FAINT)


def _smooth(values: list[float]) -> np.ndarray:
    """Centred moving mean over a fortieth of the points, windows cut short at both ends."""
    half = len(values) // 80
    sums = np.concatenate([[0.0], np.cumsum(values)])
    centres = np.arange(len(values))
    low, high = np.maximum(centres - half, 0), np.minimum(centres + half + 1, len(values))
    return (sums[high] - sums[low]) / np.maximum(high - low, 1)


def _finish(axis: Axes, title: str, stages: dict[str, list[Stage]] | None = None) -> None:
    """Title, grid and, with `stages`, a step axis of equal limits on every chart with a line per stage."""
    axis.set_title(title, fontsize=10.5, color=INK, loc="left", fontweight="bold")
    axis.spines[["top", "right"]].set_visible(False)
    axis.spines[["left", "bottom"]].set_color("#9ca3af")
    axis.grid(color=GRID, linewidth=0.7)
    axis.set_axisbelow(True)
    axis.tick_params(labelsize=8, length=0, colors=FAINT)
    if stages is None:
        return
    ends = {run: np.cumsum([stage.last_iteration for stage in members]) for run, members in stages.items()}
    total = max(int(end[-1]) for end in ends.values())
    axis.set_xlim(-0.01 * total, 1.01 * total)
    axis.set_ymargin(0.12)  # room for the stages' names
    axis.set_xlabel("step", fontsize=8, color=FAINT)
    starts = [0, *next(iter(ends.values()))[:-1]]
    for index, start in enumerate(starts if len(starts) > 1 else []):
        axis.axvline(start, color="#9ca3af", linewidth=0.8, linestyle=(0, (3, 3)), zorder=0, label="_stage")
        top = axis.get_xaxis_transform()  # data across, share of the chart upwards
        axis.text(start, 0.995, f" stage {index + 1}", transform=top, va="top", fontsize=7.5, color=FAINT)


def _draw_accuracy(axis: Axes, run: str, summary: dict[str, Any]) -> None:
    wanted = ((run, "accuracy", RUN_COLOURS[0]), ("LM only", "lm_only_accuracy", RUN_COLOURS[1]))
    bars = [(name, summary[key], colour) for name, key, colour in wanted if summary.get(key) is not None]
    _finish(axis, "Held-out accuracy per digit")
    for position, (_, share, colour) in enumerate(bars):
        axis.bar(position, 100 * share, color=colour, width=0.55)
        axis.text(position, 100 * share + 1.5, f"{100 * share:.1f} %", ha="center", fontsize=10, color=INK)
    if summary.get("chance") is not None:
        chance = 100 * summary["chance"]
        axis.axhline(chance, color=WRONG, linewidth=1.2, linestyle=(0, (4, 3)))
        middle = 0.5 if len(bars) > 1 else 0.4
        axis.text(middle, chance + 1.5, f"chance {chance:.0f} %", ha="center", fontsize=8, color=WRONG)
    axis.set_xticks(range(len(bars)), [name for name, _, _ in bars], fontsize=9)
    axis.set_xlim(-0.5, max(len(bars), 1) - 0.5)
    axis.set_ylim(0, 108)
    axis.grid(visible=False, axis="x")


def _draw_samples(figure: SubFigure, samples: list[Answer], num_rows: int, run: str) -> None:
    title = f"Held-out pages, evenly drawn: question, right answer, answer of {run}"
    figure.suptitle(title, fontsize=11.5, fontweight="bold", color=INK, x=0.012, ha="left")
    axes = np.ravel(figure.subplots(num_rows, SAMPLE_COLUMNS))
    for axis in axes:
        axis.set_axis_off()
    for axis, sample in zip(axes, samples, strict=False):
        if sample.image.is_file():
            with Image.open(sample.image) as image:
                axis.imshow(np.asarray(image.convert("RGB")), interpolation="lanczos")
        axis.set_title(_two_lines(sample.question), fontsize=9, color=INK, pad=8)
        right = [(word, INK) for word in sample.expected.split()]
        _write_words(axis, 0, "right", right)
        _write_words(axis, 1, "answer", _judged(sample.answer, sample.expected))


def _write_words(axis: Axes, line: int, name: str, words: list[tuple[str, str]]) -> None:
    """Write `name: word word ...` below a page, each word in its colour (matplotlib's text has only one)."""
    parts: list[Artist] = [TextArea(f"{name}: ", textprops={"fontsize": 8.5, "color": FAINT})]
    for word, colour in words:
        parts.append(TextArea(word, textprops={"fontsize": 10, "color": colour, "fontweight": "bold"}))
    box = AnchoredOffsetbox(
        "upper center",
        child=HPacker(children=parts, pad=0, sep=4, align="baseline"),
        pad=0.1,
        frameon=False,
        bbox_to_anchor=(0.5, -0.01 - 0.1 * line),
        bbox_transform=axis.transAxes,
    )
    axis.add_artist(box)


def _two_lines(question: str, width: int = 27) -> str:
    """Break a long question at the space nearest to its middle; always two lines, so that pages align."""
    spaces = [place for place, letter in enumerate(question) if letter == " "]
    if len(question) <= width or not spaces:
        return "\n" + question
    cut = min(spaces, key=lambda place: abs(place - len(question) / 2))
    return question[:cut] + "\n" + question[cut + 1 :]


def _judged(text: str, expected: str) -> list[tuple[str, str]]:
    """Words with colours: each green or red by the word of the right answer at its place."""
    right = expected.split()
    words = text.split()[:12] or ["(nothing)"]
    return [
        (word, RIGHT if [word] == right[place : place + 1] else WRONG) for place, word in enumerate(words)
    ]
