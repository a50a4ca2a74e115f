"""From the cells of an ablation to its summary: means, paired tests over seeds and over pages, states over training."""

import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from laver_mcore.config.errors import ConfigError
from tools.ablation.conclusion import conclusion
from tools.ablation.setting import RESULT, Setting, cells_of

LEVEL = 0.95


def paired(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, Any]:
    """Mean difference of pairs with Student's interval and two-sided p (scipy.stats.ttest_rel); null for one pair."""
    gap = np.asarray(ours, dtype=np.float64) - np.asarray(theirs, dtype=np.float64)
    found: dict[str, Any] = {
        "mean": float(gap.mean()),
        "low": None,
        "high": None,
        "p": None,
        "pairs": len(gap),
    }
    if len(gap) > 1 and np.ptp(gap) > 0:
        test = stats.ttest_rel(ours, theirs)
        interval = test.confidence_interval(LEVEL)
        found |= {"low": float(interval.low), "high": float(interval.high), "p": float(test.pvalue)}
    return found


def holm(values: Sequence[float | None]) -> list[float | None]:
    """Holm's p for each of several tests made together, null where a test is."""
    adjusted: list[float | None] = [None] * len(values)
    order = sorted((value, place) for place, value in enumerate(values) if value is not None)
    largest = 0.0
    for rank, (value, place) in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * value))
        adjusted[place] = largest
    return adjusted


def collect(setting: Setting, output: Path) -> list[dict[str, Any]]:
    """What every finished cell has: its place, its result, and its rows of metrics."""
    found = []
    for cell in cells_of(setting):
        folder = output / cell.name
        if cell.start is None or not (folder / RESULT).is_file():
            continue
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text("utf-8").splitlines()]
        result = json.loads((folder / RESULT).read_text("utf-8"))
        found.append({"task": cell.task, "arm": cell.arm, "seed": cell.seed, **result, "metrics": rows})
    return found


class _Arm:
    """The finished cells of one arm on one task, seed by seed."""

    def __init__(self, cells: Sequence[dict[str, Any]]) -> None:
        self.by_seed = {cell["seed"]: cell for cell in cells}

    def accuracy(self, seed: int) -> float:
        cell = self.by_seed[seed]
        return float(sum(cell["right"]) / sum(cell["total"]))

    def pages(self, seeds: Sequence[int]) -> NDArray[np.float64]:
        """Share of a page's digits that are read, mean over seeds, page by page."""
        cells = [self.by_seed[seed] for seed in seeds]
        return np.mean([np.divide(cell["right"], cell["total"]) for cell in cells], axis=0)

    def series(self, name: str) -> NDArray[np.float64] | None:
        """A column of the metrics, [seeds, looks]; None where the arm does not log it."""
        rows = [cell["metrics"] for cell in self.by_seed.values()]
        if any(row.get(name) is None for found in rows for row in found):
            return None
        return np.array([[row[name] for row in found] for found in rows])

    def last(self, name: str, seed: int) -> float:
        return float(self.by_seed[seed]["metrics"][-1][name])


def _spread(values: Sequence[float]) -> dict[str, float | None]:
    """Mean and sample standard deviation; the latter is null for one value."""
    deviation = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return {"mean": float(np.mean(values)), "std": deviation}


def _describe(arm: _Arm, num_layers: int) -> dict[str, Any]:
    seeds = sorted(arm.by_seed)
    metrics = arm.by_seed[seeds[0]]["metrics"]
    over_training = {}
    for name in (f"similarity_{num_layers}", "less_alike"):
        series = arm.series(name)
        if series is not None:
            over_training[name] = series.mean(0).tolist()
    return {
        "seeds": seeds,
        "accuracy": {str(seed): arm.accuracy(seed) for seed in seeds}
        | _spread([arm.accuracy(s) for s in seeds]),
        **{
            f"{name}_by_layer": [
                _spread([arm.last(f"{name}_{layer}", seed) for seed in seeds])
                for layer in range(1, num_layers + 1)
            ]
            for name in ("similarity", "rank")
        },
        "iterations": [row["iteration"] for row in metrics],
        "over_training": over_training,
        "seconds": _spread([cell["seconds"] for cell in arm.by_seed.values()]),
    }


def _compare(ours: _Arm, theirs: _Arm, num_layers: int) -> dict[str, Any] | None:
    seeds = sorted(ours.by_seed.keys() & theirs.by_seed.keys())
    if not seeds:
        return None
    deepest = f"similarity_{num_layers}"
    found = {
        "accuracy_over_seeds": paired([ours.accuracy(s) for s in seeds], [theirs.accuracy(s) for s in seeds]),
        "accuracy_over_pages": paired(ours.pages(seeds).tolist(), theirs.pages(seeds).tolist()),
        "similarity_over_seeds": paired(
            [ours.last(deepest, s) for s in seeds], [theirs.last(deepest, s) for s in seeds]
        ),
    }
    if all(arm.series("less_alike") is not None for arm in (ours, theirs)):
        means = [
            [float(np.mean([row["less_alike"] for row in arm.by_seed[s]["metrics"]])) for s in seeds]
            for arm in (ours, theirs)
        ]
        found["less_alike_over_seeds"] = paired(*means)
    return found


def summarize(setting: Setting, cells: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Everything that summary.json holds, task by task; arms and comparisons without a finished cell are left out."""
    summary: dict[str, Any] = {}
    for task in setting.tasks:
        arms = {
            name: _Arm([c for c in cells if (c["task"], c["arm"]) == (task, name)]) for name in setting.arms
        }
        arms = {name: arm for name, arm in arms.items() if arm.by_seed}
        if not arms:
            continue
        row = next(iter(next(iter(arms.values())).by_seed.values()))["metrics"][-1]
        layers = sum(name.startswith("similarity_") for name in row)
        comparisons = []
        for name, arm in arms.items():
            for other in setting.arms[name].against:
                found = _compare(arm, arms[other], layers) if other in arms else None
                if found is not None:
                    comparisons.append({"arm": name, "against": other, **found})
        adjusted = holm([each["accuracy_over_seeds"]["p"] for each in comparisons])
        for each, value in zip(comparisons, adjusted, strict=True):
            each["accuracy_over_seeds"]["p_holm"] = value
        described = {
            name: {"title": setting.arms[name].title} | _describe(arm, layers) for name, arm in arms.items()
        }
        summary[task] = {"arms": described, "comparisons": comparisons}
    return summary


def read(path: Path) -> list[dict[str, Any]]:
    """The cells of a metrics.jsonl.gz; ConfigError where it is none."""
    try:
        return [json.loads(line) for line in gzip.decompress(path.read_bytes()).splitlines()]
    except (OSError, EOFError, ValueError) as error:
        raise ConfigError(f"{path} is no metrics.jsonl.gz of an ablation ({error})") from None


def write(setting: Setting, output: Path, cells: Sequence[dict[str, Any]]) -> str:
    """Write metrics.jsonl.gz, summary.json and conclusion.md; returns the last."""
    output.mkdir(parents=True, exist_ok=True)
    with gzip.GzipFile(output / "metrics.jsonl.gz", "wb", mtime=0) as file:
        file.write("".join(json.dumps(cell) + "\n" for cell in cells).encode())
    summary = summarize(setting, cells)
    text = conclusion(summary)
    (output / "summary.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    (output / "conclusion.md").write_text(text, encoding="utf-8")
    return text
