"""Steps that changed nothing because their gradients were not finite: who was in them, and when it is too many."""

import json
import os
from collections.abc import Sequence
from pathlib import Path

import torch

from laver_mcore.data.sequence.batch import Batch

_NAMED = 8
"""Samples that a line names; the file names all."""


class DivergedError(RuntimeError):
    """Training cannot go on from here; the message is one line."""


class Skips:
    """Remembers the last steps and looks at what became of them once in `limit` steps, so that no step waits.

    `DivergedError` after `limit` skipped ones in a row, on all ranks alike. What was skipped is written to `file`, by
    every rank that `speaks` for its samples.
    """

    def __init__(self, limit: int, file: Path | None, *, speaks: bool) -> None:
        self._limit, self._file, self._speaks = limit, file, speaks
        self._pending: list[tuple[int, torch.Tensor, Sequence[Batch]]] = []
        self.in_a_row = 0
        """Steps that were skipped up to the last one that was looked at."""

    def add(self, iteration: int, applied: torch.Tensor, batches: Sequence[Batch]) -> None:
        """Take in the step that ended as `iteration`."""
        self._pending.append((iteration, applied, batches))
        if len(self._pending) >= self._limit:
            self.look()

    def look(self) -> None:
        """Read what became of the remembered steps; waits for the device."""
        if not self._pending:
            return
        flags = torch.stack([applied for _, applied, _ in self._pending]).tolist()
        reached = None
        for (iteration, _, batches), applied in zip(self._pending, flags, strict=True):
            self.in_a_row = 0 if applied else self.in_a_row + 1
            if not applied:
                self._tell(iteration, batches)
            if self.in_a_row == self._limit:
                reached = iteration
        self._pending = []
        if reached is not None:
            raise DivergedError(
                f"{self._limit} steps in a row, up to iteration {reached}, had gradients that are not finite; "
                "nothing of them was kept, and the last checkpoint is as it was"
            )

    def _tell(self, iteration: int, batches: Sequence[Batch]) -> None:
        if not self._speaks:
            return
        keys = list(dict.fromkeys(key for batch in batches for key in batch.sample_keys))
        named = ", ".join(keys[:_NAMED]) + (f" and {len(keys) - _NAMED} more" if len(keys) > _NAMED else "")
        print(
            f"iteration {iteration} was skipped, its gradients are not finite; samples: {named}", flush=True
        )
        if self._file is not None:
            line = json.dumps({"iteration": iteration, "samples": keys}) + "\n"
            # One write in append mode, so that ranks sharing the file do not tear each other's lines.
            opened = os.open(self._file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
            try:
                os.write(opened, line.encode())
            finally:
                os.close(opened)
