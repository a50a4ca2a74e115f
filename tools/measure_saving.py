"""How long training waits for a save, with and without --async-save: the same model, in turns, in one run.

    python tools/measure_saving.py --folder /scratch/saves        # 217 M parameters and their teacher on a CPU, minutes
    python tools/measure_saving.py --num-layers 2 --rounds 1      # a quick look

What --async-save still waits for is its beginning (what is saved is put together, looked at and copied from a GPU) and
its end (sealed, given its name); steps in between share the machine's cores, and its disk, with the writer.
"""

import dataclasses
import json
import shutil
import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import tyro

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from tools.training_benchmark.setting import Setting  # noqa: E402


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    """Measure what a save costs a run."""

    hidden_size: int = 1024
    num_layers: int = 14
    rounds: int = 3
    """Saves of each kind, in turns."""
    folder: Path | None = None
    """Where to write, and delete again; a temporary folder where not given."""
    output: Path | None = None
    """JSON file for the figures."""


class Run:
    """An engine that takes steps over the same batches."""

    def __init__(self, arguments: Arguments) -> None:
        import torch

        from laver_mcore.megatron import parallel
        from laver_mcore.train.build import build_engine
        from tools.training_benchmark.batches import global_batch, packed
        from tools.training_benchmark.setting import engine_config, vocabulary

        setting = Setting(
            model="tiny", hidden_size=arguments.hidden_size, num_layers=arguments.num_layers,
            image_side=8, text_tokens=60, seq_length=256, global_batch_size=1,
        )  # fmt: skip
        config = engine_config(setting, laver=True)
        topology = parallel.build_topology(config.parallel, torch.device("cpu"))
        self.engine, _ = build_engine(config, topology, vocabulary(config))
        self._batches = [packed(batch, setting) for batch in global_batch(setting, vocabulary(config), 0)]
        self.steps = 0

    def step(self) -> float:
        """Seconds of one."""
        from laver_mcore.train.step import train_step

        started = time.perf_counter()
        float(train_step(self.engine, self._batches, self.steps).grad_norm)
        self.steps += 1
        return time.perf_counter() - started


def measure(arguments: Arguments, folder: Path) -> dict[str, Any]:
    """Medians over the rounds, in seconds."""
    import torch.distributed as dist

    from laver_mcore.train.checkpoint import Progress, begin_save

    run = Run(arguments)
    found: dict[str, list[float]] = {
        name: [] for name in ("step", "save", "begin", "end", "async_save", "step_beside", "steps_beside")
    }
    run.step()  # gives Adam its moments
    size = 0
    for _ in range(arguments.rounds):
        found["step"] += [run.step() for _ in range(3)]
        for beside in (False, True):
            started = time.perf_counter()
            write = begin_save(run.engine, folder, Progress(iteration=run.steps), "")
            begun = time.perf_counter() - started
            steps = []
            while beside and not write.is_written(dist.group.WORLD):  # type: ignore[arg-type]
                steps.append(run.step())
            ending = time.perf_counter()
            kept = write.finish()
            now = time.perf_counter()
            if beside:
                found["begin"].append(begun)
                found["end"].append(now - ending)
                found["async_save"].append(begun + now - ending)
                found["step_beside"] += steps
                found["steps_beside"].append(len(steps))
            else:
                found["save"].append(now - started)
            size = sum(file.stat().st_size for file in kept.iterdir())
            shutil.rmtree(kept)
            time.sleep(2.0)  # for the disk
    medians = {name: statistics.median(values) for name, values in found.items() if values}
    parameters = sum(p.numel() for chunk in run.engine.chunks for p in chunk.parameters())
    return {
        "parameters": parameters,
        "gigabytes": size / 1e9,
        **medians,
        "of_save": medians["async_save"] / medians["save"],
        "all": found,
    }


def main() -> int:
    """Measure, print, and write what was found."""
    arguments = tyro.cli(Arguments, description=__doc__)
    warnings.filterwarnings("ignore")
    from laver_mcore.megatron import parallel

    parallel.init_distributed()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        found = measure(arguments, Path(folder))
    print(f"{found['parameters'] / 1e6:,.0f} M parameters, {found['gigabytes']:.2f} GB a checkpoint")
    print(f"a save:         training waits {found['save']:.2f} s")
    print(
        f"--async-save:   training waits {found['async_save']:.2f} s, {found['of_save']:.1%} of it "
        f"({found['begin']:.2f} s at its beginning, {found['end']:.2f} s at its end)"
    )
    print(
        f"a step:         {found['step']:.2f} s; {found.get('step_beside', float('nan')):.2f} s of the "
        f"{found['steps_beside']:.0f} beside the writer"
    )
    if arguments.output is not None:
        arguments.output.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    parallel.shut_down()
    return 0


if __name__ == "__main__":
    sys.exit(main())
