"""How an iteration reads on a terminal: short, aligned, with the time left; or in Megatron's form."""

import time
from collections import deque
from datetime import timedelta
from statistics import median
from typing import Any

_NOT_LOSSES = ("valid_accuracy", "visual_similarity", "teacher_distance", "grad_norm")
_REMEMBERED = 20
"""Iteration lines whose times the time left is told from."""


def megatron_line(row: dict[str, Any], train_iters: int, global_batch_size: int, seconds: float) -> str:
    """One line in Megatron's form: ` iteration 10/ 100 | ... | lm loss: 1.2E+00 | grad norm: 0.5 |`."""
    parts = [
        f" [{time.strftime('%Y-%m-%d %H:%M:%S')}] iteration {row['iteration']:8d}/{train_iters:8d}",
        f"elapsed time per iteration (ms): {seconds * 1000:.1f}",
        f"throughput per GPU (TFLOP/s/GPU): {row['tflops_per_gpu']:.1f}",
        f"learning rate: {row['learning_rate']:.6E}",
        f"global batch size: {global_batch_size:5d}",
    ]
    losses = [name for name in row if name == "loss" or name.endswith("_loss")]
    for name in (*losses, *_NOT_LOSSES):
        if row.get(name) is not None:
            parts.append(f"{name.replace('_', ' ')}: {row[name]:.6E}")
    parts.append(f"number of skipped iterations: {row['skipped']:3d}")
    return " | ".join(parts) + " |"


class ShortLine:
    """Iterations in a line each of about a terminal's width; what an iteration does not have is left blank."""

    def __init__(self, train_iters: int) -> None:
        self._train_iters = train_iters
        self._seconds: deque[float] = deque(maxlen=_REMEMBERED)

    def __call__(self, row: dict[str, Any], seconds: float) -> str:
        """The line of a metrics row whose iterations took `seconds` each."""
        self._seconds.append(seconds)
        width = len(f"{self._train_iters:,}")
        parts = [f"{row['iteration']:>{width},}/{self._train_iters:,}"]
        parts += [f"{name} {_number(row[column]):>7}" for column, name in self._losses(row)]
        parts += [f"grad {_number(row['grad_norm']):>7}", f"lr {row['learning_rate']:.1e}"]
        parts += [f"{_duration(seconds)}/it", f"{_count(row['tokens_per_second']):>5} tok/s"]
        if row.get("mfu") is not None:
            parts.append(f"MFU {row['mfu']:.0%}")
        if row["skipped"]:
            parts.append(f"{row['skipped']} skipped")
        parts.append(f"{self.left(row['iteration'])} left")
        if row.get("valid_accuracy") is not None:
            parts.append(f"held-out accuracy {row['valid_accuracy']:.1%}")
        return "  ".join(parts)

    def left(self, iteration: int) -> str:
        """The time until the last iteration, at the pace of the newest lines."""
        return str(timedelta(seconds=round(median(self._seconds) * (self._train_iters - iteration))))

    @staticmethod
    def _losses(row: dict[str, Any]) -> list[tuple[str, str]]:
        """(Column, name) of the losses of a row: the total alone where it is the only term."""
        terms = [name for name in row if name.endswith("_loss") and not name.startswith("valid")]
        shown = ["loss", *terms] if len(terms) > 1 else ["loss"]
        held_out = [name for name in row if name.startswith("valid") and name.endswith("_loss")]
        names = {column: column.removesuffix("_loss").replace("_", " ") for column in shown}
        names |= {column: "held-out" for column in held_out if row[column] is not None}
        return [(column, name) for column, name in names.items()]


def _number(value: float | None) -> str:
    """Four digits that count: 1.234, 0.01234, 1.2e-06; blank for none."""
    if value is None:
        return ""
    return f"{value:.4f}" if 1e-2 <= abs(value) < 100 or value == 0 else f"{value:.1e}"


def _duration(seconds: float) -> str:
    return f"{seconds * 1000:4.0f} ms" if seconds < 1 else f"{seconds:4.1f} s "


def _count(number: float) -> str:
    """1234567 -> 1.23M, three digits that count."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.0f}"
