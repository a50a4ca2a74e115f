"""When a run saves, what it says of it, and what it keeps."""

import time

import torch.distributed as dist

from laver_mcore.megatron.checkpoints import SaveError
from laver_mcore.megatron.publishing import Write, prune
from laver_mcore.train import checkpoint
from laver_mcore.train.checkpoint import Progress
from laver_mcore.train.engine import Engine
from laver_mcore.train.skips import DivergedError


class Saver:
    """Context in which a run saves; with `--async-save` a checkpoint is on its way while training goes on.

    All ranks take part in everything. One that cannot be written is a line, and the run goes on.
    """

    def __init__(self, engine: Engine, fingerprint: str) -> None:
        self._engine, self._run, self._fingerprint = engine, engine.config.run, fingerprint
        self._asks = dist.new_group(backend="gloo") if self._run.async_save else None
        self._pending: Write | None = None
        self._iteration, self._begun, self._blocked = 0, 0.0, 0.0

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None or issubclass(kind, DivergedError):  # which all ranks raise alike
            self.wait()

    def save(self, progress: Progress, just_skipped: int, *, last: bool) -> None:
        """Write a checkpoint, after the one before; `SaveError` where there will be no other chance."""
        self.wait()
        try:
            # Weights that give such gradients are worth less than those before.
            if just_skipped > 1 and not last:
                raise SaveError(
                    f"iteration {progress.iteration}: not saved (the last {just_skipped} steps were skipped)"
                )
            self._iteration, self._begun = progress.iteration, time.perf_counter()
            assert self._run.save is not None
            self._pending = checkpoint.begin_save(self._engine, self._run.save, progress, self._fingerprint)
            self._blocked = time.perf_counter() - self._begun
            if self._asks is None or last:
                self._finish()
        except SaveError as error:
            if last:
                raise
            self._say(f"{error}; going on, the next save is tried")

    def look(self) -> None:
        """Publish the checkpoint that is on its way, if all ranks have written their part; no rank waits."""
        if self._pending is not None and self._asks is not None and self._pending.is_written(self._asks):
            self.wait()

    def wait(self) -> None:
        """Wait for the checkpoint that is on its way, if there is one."""
        try:
            self._finish()
        except SaveError as error:
            self._say(f"{error}; going on, the next save is tried")

    def _finish(self) -> None:
        """Publish what is on its way, and delete what the recipe does not keep."""
        if self._pending is None:
            return
        start, write, self._pending = time.perf_counter(), self._pending, None
        folder = write.finish()
        prune(folder.parent, self._iteration, keep_last=self._run.keep_last, keep_every=self._run.keep_every)
        now = time.perf_counter()
        waited = self._blocked + now - start
        beside = f", training waited {waited:.1f} s" if self._asks is not None else ""
        self._say(f"saved {folder} in {now - self._begun:.1f} s{beside}")

    def _say(self, message: str) -> None:
        if self._engine.topology.is_last_rank:
            print(message, flush=True)
