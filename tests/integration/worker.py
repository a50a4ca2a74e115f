"""Run training scenarios one after another inside one torchrun: `worker.py SCENARIOS.json`.

Starting processes and importing torch takes longer than training a tiny model, so one launch serves many layouts.
"""

import json
import traceback
import warnings
from dataclasses import replace
from pathlib import Path

from laver_mcore.cli.console import run_and_leave

FIELDS = ("document_lengths", "image_grids", "image_keys", "tokens_T", "labels_T", "visual_rows_N", "pixels")


class Step:
    """`train_step` with one step's pixels made infinite, and what it was given kept: weights at first, batches."""

    def __init__(self, train_step, scenario) -> None:
        self._train_step, self._spoiled, self._record = train_step, scenario["spoiled"], scenario["record"]
        self.batches = []

    def __call__(self, engine, batches, iteration, *timers):
        from laver_mcore.train import checkpoint
        from laver_mcore.train.checkpoint import Progress

        if self._record and not self.batches:
            checkpoint.save(engine, Path(self._record).parent / "start", Progress(), "")
        self.batches.append([{name: getattr(batch, name) for name in FIELDS} for batch in batches])
        if iteration == self._spoiled:
            batches = [
                batch if batch.pixels is None else replace(batch, pixels=batch.pixels * float("inf"))
                for batch in batches
            ]
        return self._train_step(engine, batches, iteration, *timers)

    def save(self) -> None:
        import torch

        if self._record:
            torch.save(self.batches, self._record)


def main(argv: list[str]) -> int:
    warnings.filterwarnings("ignore")
    import torch.distributed as dist

    from laver_mcore.cli.run import train_run
    from laver_mcore.config.load import parse
    from laver_mcore.megatron import parallel
    from laver_mcore.train import loop

    device = parallel.init_distributed(timeout_minutes=2)

    train_step = loop.train_step
    for scenario in json.loads(Path(argv[0]).read_text()):
        config, _ = parse(scenario["argv"])
        loop.train_step = step = Step(train_step, scenario)
        try:
            train_run(config, device)
            step.save()
        except Exception:
            if not scenario["may_fail"]:
                raise
            if dist.get_rank() == 0:
                Path(scenario["error"]).write_text(traceback.format_exc())
        dist.barrier()
        parallel.forget_groups()
    return 0


if __name__ == "__main__":
    run_and_leave(main)
