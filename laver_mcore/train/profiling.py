"""`--profile`: a trace of some iterations for TensorBoard or chrome://tracing, and the history of GPU memory."""

from pathlib import Path

import torch

from laver_mcore.config.schema import RunConfig


class Profiler:
    """Traces iterations `profile_step_start` up to `profile_step_end` of the ranks in `profile_ranks`.

    Call `begin(iteration)` before and `end(iteration)` after each step, iterations counted from 1 as in the metrics.
    Writes `SAVE/profile/rank0.pt.trace.json`, and `rank0.memory.pickle` with `record_memory_history` on a GPU.
    """

    def __init__(self, run: RunConfig, rank: int) -> None:
        self._active = run.profile and rank in run.profile_ranks
        self._history = run.record_memory_history and rank in run.profile_ranks and torch.cuda.is_available()
        self._first, self._last = run.profile_step_start, run.profile_step_end
        self._stem = Path(run.save or ".") / "profile" / f"rank{rank}"
        self._profile: torch.profiler.profile | None = None

    def begin(self, iteration: int) -> None:
        """Start the trace if this is its first iteration (or the first that this process runs)."""
        if not (self._active and self._profile is None and self._first <= iteration < self._last):
            return
        if self._history:
            torch.cuda.memory._record_memory_history()
        activities = [torch.profiler.ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        self._profile = torch.profiler.profile(activities=activities, record_shapes=True)
        self._profile.start()

    def end(self, iteration: int, *, exiting: bool = False) -> None:
        """Write the trace if this was its last iteration, or the run's."""
        if self._profile is None or not (exiting or iteration >= self._last - 1):
            return
        self._stem.parent.mkdir(parents=True, exist_ok=True)
        self._profile.stop()
        self._profile.export_chrome_trace(f"{self._stem}.pt.trace.json")
        if self._history:
            torch.cuda.memory._dump_snapshot(f"{self._stem}.memory.pickle")
            torch.cuda.memory._record_memory_history(enabled=None)
        self._profile, self._active = None, False
