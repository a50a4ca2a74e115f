"""What a run says: metrics.jsonl, TensorBoard, W&B, a line an iteration, a progress bar on a terminal, a summary."""

import json
import math
import sys
import uuid
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tqdm import tqdm

from laver_mcore.config.schema import Config
from laver_mcore.train.lines import ShortLine, megatron_line


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
        self._short = ShortLine(total)
        self._tokens, self._seconds, self._last = 0.0, 0.0, start_iteration
        self._losses: list[tuple[float, int]] = []
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
        self._remember(row, seconds)
        train = self._config.train
        if self._config.run.log_format == "megatron":
            line = megatron_line(row, train.train_iters, train.global_batch_size, seconds)
        else:
            line = self._short(row, seconds)
        if self._bar is None:
            print(line, flush=True)
        else:
            self._bar.set_postfix_str(_postfix(row))
            self._bar.write(line)
            self._bar.update(row["iteration"] - self._bar.n)

    def _remember(self, row: dict[str, Any], seconds: float) -> None:
        """What the summary tells of."""
        of_line = seconds * (row["iteration"] - self._last)
        self._tokens += row["tokens_per_second"] * of_line
        self._seconds += of_line
        self._last = row["iteration"]
        if row["loss"] is not None and math.isfinite(row["loss"]):
            self._losses.append((row["loss"], row["iteration"]))

    def summary(self) -> list[str]:
        """What is worth knowing once a run has ended: its pace, its loss, and where its numbers are."""
        lines = []
        if self._seconds:
            rate = self._tokens / self._seconds
            lines.append(
                f"{self._tokens:,.0f} tokens at {rate:,.0f} a second, checkpoints and validation aside"
            )
        if self._losses:
            (last, _), (best, at) = self._losses[-1], min(self._losses)
            lines.append(f"loss {last:.4f} at the end, {best:.4f} at its lowest (iteration {at:,})")
        if self._config.run.save:
            lines.append(f"every iteration's numbers: {self._config.run.save}/metrics.jsonl")
        return lines

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
