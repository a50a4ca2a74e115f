"""What a run says: metrics.jsonl, TensorBoard, W&B, Megatron's iteration line, a progress bar on a terminal."""

import json
import math
import sys
import time
import uuid
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tqdm import tqdm

from laver_mcore.config.schema import Config

_NOT_LOSSES = ("valid_accuracy", "visual_similarity", "teacher_distance", "grad_norm")


def format_iteration_line(
    row: dict[str, Any], train_iters: int, global_batch_size: int, seconds: float
) -> str:
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


def _postfix(row: dict[str, Any]) -> str:
    """What a progress bar says of the newest line."""
    shown = {"loss": ".4f", "valid_lm_loss": ".4f", "valid_accuracy": ".1%"}
    return ", ".join(
        f"{name.replace('_', ' ')} {row[name]:{form}}"
        for name, form in shown.items()
        if row.get(name) is not None
    )


def _truncate(path: Path, iteration: int) -> None:
    """Drop lines past the iteration a run resumes from: they are about to be written again."""
    if not path.is_file():
        return
    lines = path.read_text(encoding="utf-8").splitlines()
    if iteration == 0 and lines:  # another run's, or one whose checkpoints are gone: kept, whatever it was
        number = 1 + sum(1 for _ in path.parent.glob(f"{path.stem}.before-*{path.suffix}"))
        path.rename(path.with_name(f"{path.stem}.before-{number}{path.suffix}"))
        return
    kept = []
    for line in lines:
        try:
            if json.loads(line)["iteration"] <= iteration:
                kept.append(line + "\n")
        except (json.JSONDecodeError, KeyError):
            continue  # the last line of a run that was killed while writing it
    path.write_text("".join(kept), encoding="utf-8")


def _wandb_settings(config: Config, start_iteration: int) -> dict[str, Any]:
    """What Weights & Biases is told: everything lies under --save, and a resumed run goes on as the same one."""
    settings: dict[str, Any] = dict(project=config.run.wandb_project, name=config.run.wandb_exp_name)
    settings["config"] = asdict(config) | {
        "objective": {"name": config.objective.name, **asdict(config.objective)}
    }
    if config.run.save is None:
        return settings
    file = Path(config.run.save) / "wandb_id.txt"
    if start_iteration == 0 or not file.is_file():
        file.write_text(uuid.uuid4().hex[:8], encoding="ascii")
    return settings | dict(dir=config.run.save, id=file.read_text("ascii"), resume="allow")


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: null."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Metrics:
    """Writer of one run's metrics, on the rank that sees the losses; every other rank has none."""

    def __init__(self, config: Config, start_iteration: int) -> None:
        self._config = config
        self._file = None
        self._tensorboard: Any = None
        self._wandb: Any = None
        total = config.train.train_iters
        self._bar = (
            tqdm(total=total, initial=start_iteration, unit="it", dynamic_ncols=True)
            if sys.stderr.isatty()
            else None
        )
        if config.run.save:
            directory = Path(config.run.save)
            directory.mkdir(parents=True, exist_ok=True)
            path = directory / "metrics.jsonl"
            _truncate(path, start_iteration)
            self._file = path.open("a", encoding="utf-8")
            if config.run.tensorboard:
                from torch.utils.tensorboard import SummaryWriter

                self._tensorboard = SummaryWriter(
                    str(directory / "tensorboard"), purge_step=start_iteration + 1
                )
        if config.run.wandb_project:
            import wandb

            self._wandb = wandb.init(**_wandb_settings(config, start_iteration))

    def write(self, row: dict[str, Any], seconds: float) -> None:
        """Record one iteration; `seconds` is the time it took."""
        if self._file is not None:
            self._file.write(json.dumps({k: _finite(v) for k, v in row.items()}, allow_nan=False) + "\n")
            self._file.flush()
        numbers = {k: v for k, v in row.items() if k != "iteration" and v is not None}
        if self._tensorboard is not None:
            for name, value in numbers.items():
                self._tensorboard.add_scalar(name, value, row["iteration"])
        if self._wandb is not None:
            self._wandb.log(numbers, step=row["iteration"])
        train = self._config.train
        line = format_iteration_line(row, train.train_iters, train.global_batch_size, seconds)
        if self._bar is None:
            print(line, flush=True)
        else:
            self._bar.set_postfix_str(_postfix(row))
            self._bar.write(line)
            self._bar.update(row["iteration"] - self._bar.n)

    def close(self) -> None:
        """Flush everything to disk."""
        if self._bar is not None:
            self._bar.close()
        if self._file is not None:
            self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()
