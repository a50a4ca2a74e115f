"""Exact one-to-one assignment of visual tokens to pool rows, worked out by host threads beside the device.

scipy's solver lets go of Python's lock, so that images are matched side by side and the thread that feeds the device
goes on. Of R tokens each is matched with one of its own R nearest rows (at most R - 1 of them can be taken), so all
other columns are left out first: the answer is the same, in a fifth of the time where a few rows are near to all.
"""

import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch


def match(cost_RP: np.ndarray) -> np.ndarray:
    """Columns [R], no two alike, of the smallest total cost; there are at least as many columns as rows."""
    num_rows, num_columns = cost_RP.shape
    from scipy.optimize import linear_sum_assignment  # half a second that reading a recipe does not need

    if not num_rows:
        return np.zeros(0, dtype=np.int64)
    columns = np.arange(num_columns)
    if num_rows < num_columns:
        columns = np.unique(np.argpartition(cost_RP, num_rows - 1, axis=1)[:, :num_rows])
    _, chosen = linear_sum_assignment(cost_RP[:, columns])
    return columns[chosen]


@torch.no_grad()
def distances(tokens_RD: torch.Tensor, pool_PD: torch.Tensor) -> torch.Tensor:
    """Euclidean distances [R, P] in fp32: in bfloat16 they take a few dozen values, and ties decide."""
    return torch.cdist(tokens_RD.float(), pool_PD.float())


class Matcher:
    """Solves assignments in threads; costs are copied to the host without waiting for the device."""

    def __init__(self, num_threads: int) -> None:
        self._threads = ThreadPoolExecutor(num_threads, thread_name_prefix="match")
        self.waited = 0.0
        """Seconds that somebody waited for answers."""

    def submit(self, cost_RP: torch.Tensor) -> "Future[np.ndarray]":
        """Begin to match; the answer is `match` of these costs."""
        if not cost_RP.is_cuda:
            return self._threads.submit(match, cost_RP.numpy())
        host_RP = torch.empty(cost_RP.shape, pin_memory=True)
        host_RP.copy_(cost_RP, non_blocking=True)
        copied = torch.cuda.Event()
        copied.record()
        return self._threads.submit(_match_after, copied, host_RP)

    def wait(self, answers: Sequence["Future[np.ndarray]"]) -> list[np.ndarray]:
        """The answers, in order."""
        started = time.perf_counter()
        found = [answer.result() for answer in answers]
        self.waited += time.perf_counter() - started
        return found


def _match_after(copied: torch.cuda.Event, host_RP: torch.Tensor) -> np.ndarray:
    copied.synchronize()
    return match(host_RP.numpy())
