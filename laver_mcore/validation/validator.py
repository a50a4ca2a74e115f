"""Validation of a run in training: when it is due, what it finds, and the checkpoint that was best by it."""

import json
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from laver_mcore.config.load import to_yaml
from laver_mcore.data.records.sample import Sample
from laver_mcore.data.serve.exchange import Exchange
from laver_mcore.data.serve.loader import DialogueData
from laver_mcore.train import checkpoint
from laver_mcore.train.checkpoint import Progress
from laver_mcore.train.engine import Engine
from laver_mcore.validation.answers import Reader, accuracy
from laver_mcore.validation.loss import held_out_loss

BEST, BEST_FILE = "best", "best.json"
_SMALLER_IS_BETTER = {"valid_lm_loss": True, "valid_accuracy": False}


@dataclass(frozen=True, kw_only=True)
class Validator:
    """Held-out data and what is asked of it; called with where the run stands, by all ranks together."""

    engine: Engine
    data: DialogueData
    exchange: Exchange
    questions: list[tuple[Sample, int]]
    reader: Reader
    fingerprint: str
    """Of the training data, for the best checkpoint."""

    def due(self, iteration: int, *, exiting: bool) -> bool:
        """Whether the run validates after this iteration, counted from 1."""
        return exiting or iteration % self.engine.config.validation.eval_interval == 0

    def __call__(self, progress: Progress) -> dict[str, float | None]:
        """Entries for the metrics, the same on all ranks; keeps the checkpoint if it is the best one yet."""
        engine, settings, started = self.engine, self.engine.config.validation, time.perf_counter()
        found: dict[str, float | None] = {
            "valid_lm_loss": held_out_loss(engine, self.data, self.exchange, self.num_steps())
        }
        if self.questions:
            found["valid_accuracy"] = accuracy(self.questions, engine, self.reader)
        if settings.save_best is not None and engine.config.run.save:
            self._keep_if_best(Path(engine.config.run.save) / BEST, progress, found[settings.save_best])
        return {**found, "valid_seconds": time.perf_counter() - started}

    def num_steps(self) -> int:
        """Steps of one validation: as many as asked for, or as the held-out rows fill."""
        batch, asked = self.engine.config.train.global_batch_size, self.engine.config.validation.eval_iters
        return min(asked, -(-self.data.rows_per_epoch(0) // batch))

    def _keep_if_best(self, folder: Path, progress: Progress, value: float | None) -> None:
        metric = self.engine.config.validation.save_best
        assert metric is not None
        best = _read(folder / BEST_FILE, metric)
        if value is None or (best is not None and not _better(value, best, metric)):
            return
        kept = checkpoint.save(self.engine, folder, progress, self.fingerprint)
        if dist.get_rank() == 0:
            (folder / "config.yaml").write_text(to_yaml(self.engine.config), encoding="utf-8")
            said = {"iteration": progress.iteration, "metric": metric, "value": value}
            (folder / BEST_FILE).write_text(json.dumps(said) + "\n", encoding="utf-8")
            for other in folder.glob("iter_*"):
                if other != kept:
                    shutil.rmtree(other)
        dist.barrier()


def _better(value: float, best: float, metric: str) -> bool:
    return value < best if _SMALLER_IS_BETTER[metric] else value > best


def _read(file: Path, metric: str) -> float | None:
    """The best value of this metric so far; None before the first one, or where another metric was asked for."""
    if not file.is_file():
        return None
    said = json.loads(file.read_text(encoding="utf-8"))
    return float(said["value"]) if said["metric"] == metric else None
