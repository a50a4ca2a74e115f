"""Samples that could not be used: listed in quarantine.jsonl, and too many of them stop the run."""

import json
import logging
import os
import threading
from collections import Counter
from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path

from laver_mcore.data.errors import DataError

logger = logging.getLogger(__name__)

_GRACE = 8  # failures during a run before the rate is looked at


class Quarantine:
    """Counts and lists bad samples; `path` None only counts. `max_fraction` of the data may be bad."""

    def __init__(self, path: Path | None, max_fraction: float) -> None:
        if not 0.0 <= max_fraction <= 1.0:
            raise DataError(f"max_bad_fraction={max_fraction} is not between 0 and 1")
        self._path, self._max_fraction = path, max_fraction
        # As written, not as rounded to binary: 0.29 of 100 samples is 29.
        self._share = Fraction(str(max_fraction))
        self._lock = threading.Lock()
        self._listed: set[str] = set()
        self._failed: set[str] = (
            set()
        )  # during the run, whose samples are those that the index has not left out
        self._num_seen = 0
        self._last = ""

    def __len__(self) -> int:
        return len(self._listed)

    def add_unusable(self, bad: Iterable[tuple[str, str, str]], total: int) -> None:
        """List what the index left out, (where, reason, kind) each, and log how many of each kind.

        DataError when they are more than the allowed fraction of `total`.
        """
        found = list(bad)
        if len(found) > self._share * total:  # the run has not begun: it leaves nothing behind
            raise DataError(self._too_many(found[0][1], len(found), total))
        # Every rank reads the same index; torchrun's first one lists what it left out.
        write = os.environ.get("RANK", "0") == "0"
        for where, reason, _ in found:
            self._list(where, reason, write)
        if found and write:
            kinds = Counter(kind for _, _, kind in found)
            counts = ", ".join(f"{number} by {kind}" for kind, number in sorted(kinds.items()))
            logger.warning("left out %d of %d samples: %s", len(found), total, counts)

    def add_failure(self, key: str, reason: str, *, write: bool) -> None:
        """Count a sample that failed during the run, on whatever rank; the one that found it writes it down."""
        self._list(key, reason, write)
        self._failed.add(key)
        self._last = reason

    def check(self) -> None:
        """DataError when too many have failed."""
        num_failed = len(self._failed)
        if num_failed > _GRACE and num_failed > self._share * self._num_seen:
            raise DataError(self._too_many(self._last, num_failed, self._num_seen))

    def saw(self, num_samples: int) -> None:
        """Count samples that the ranks of the run have read, good or bad."""
        with self._lock:
            self._num_seen += num_samples

    def _too_many(self, reason: str, num_bad: int, total: int) -> str:
        return (
            f"{reason} ({num_bad} of {total} samples are bad, more than max_bad_fraction="
            f"{self._max_fraction}; clean the data with laver prepare, or raise it)"
        )

    def _list(self, name: str, reason: str, write: bool) -> None:
        with self._lock:
            if name in self._listed:
                return
            self._listed.add(name)
            if self._path is None or not write:
                return
            self._path.parent.mkdir(parents=True, exist_ok=True)
            line = json.dumps({"sample": name, "reason": reason}) + "\n"
            # One write in append mode, so that ranks sharing the file do not tear each other's lines.
            file = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
            try:
                os.write(file, line.encode())
            finally:
                os.close(file)
