"""What an objective adds to a step of the language model alone: steps in turn, medians, and the wait for matching.

    python tools/benchmark_objectives.py                          # minutes on two cores
    python tools/benchmark_objectives.py --hidden-size 1024       # nearer to what a GPU does in the same time

The decoder is scaled down, and with it VIRAL's projector and features (2,048 and 768 beside 3,584); what ViCToR matches
has its published size, 547 tokens of 27 x 27 with 2,048 rows, in micro-batches of two images. VIRAL reads its targets
from a cache, whose reading is timed by itself: it is the data worker's, not the step's.
"""

import dataclasses
import json
import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import tyro
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from tools.training_benchmark.setting import Setting  # noqa: E402

GRID = (16, 16)
"""Features of DINOv2 at its processor's own size."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    """Measure objectives beside the language model alone."""

    hidden_size: int = 512
    num_layers: int = 4
    micro_batches: int = 4
    """In a step, each of two images."""
    steps: int = 8
    """Timed steps of each objective, in turns; one more before them is not timed."""
    match_threads: int = 4
    output: Path | None = None
    """JSON file for the figures."""


def setting_of(arguments: Arguments) -> Setting:
    return Setting(
        model="tiny",
        hidden_size=arguments.hidden_size,
        num_layers=arguments.num_layers,
        image_side=27,
        seq_length=2048,
        global_batch_size=arguments.micro_batches,
    )


def objectives(arguments: Arguments, cache: Path) -> dict[str, Any]:
    """Name -> its section of the recipe."""
    from laver_mcore.config.schema import ObjectiveConfig
    from laver_mcore.objectives.victor import VictorConfig
    from laver_mcore.objectives.viral import ViralConfig

    inner = round(2048 / 3584 * arguments.hidden_size)
    viral = ViralConfig(
        target_cache=str(cache), target_layers=(arguments.num_layers // 2,), projector_hidden_size=inner
    )
    return {
        "lm": ObjectiveConfig(),
        "victor": VictorConfig(match_threads=arguments.match_threads),
        "viral, targets from a cache": viral,
    }


class Timed:
    """One objective's engine, taking steps over the same batches as the others'."""

    def __init__(self, arguments: Arguments, section: Any, width: int) -> None:
        import torch

        from laver_mcore.megatron import parallel
        from laver_mcore.train.build import build_engine
        from tools.training_benchmark.batches import global_batch, packed
        from tools.training_benchmark.setting import TRAINABLE, engine_config, vocabulary

        setting = setting_of(arguments)
        config = engine_config(setting, laver=False)
        own = tuple(weight.name for weight in section.parameters(config))
        config = dataclasses.replace(
            config,
            objective=section,
            train=dataclasses.replace(config.train, trainable=(*TRAINABLE, *own)),
            vision=dataclasses.replace(config.vision, normalize_visual_tokens=section.normalizes),
        )
        topology = parallel.build_topology(config.parallel, torch.device("cpu"))
        self._engine, _ = build_engine(config, topology, vocabulary(config))
        draw = torch.Generator().manual_seed(0)
        self._batches = []
        for batch in global_batch(setting, vocabulary(config), 0):
            made = packed(batch, setting)
            shape = (made.num_images, GRID[0] * GRID[1], width)
            targets = torch.randn(shape, generator=draw).bfloat16().view(torch.int16)
            self._batches.append(dataclasses.replace(made, targets=targets))
        self.seconds: list[float] = []
        self.waited: list[float] = []

    def step(self, number: int) -> None:
        from laver_mcore.train.step import train_step

        matcher = getattr(self._engine.objective, "matcher", None)
        before, started = getattr(matcher, "waited", 0.0), time.perf_counter()
        result = train_step(self._engine, self._batches, number)
        float(result.grad_norm)
        self.seconds.append(time.perf_counter() - started)
        self.waited.append(getattr(matcher, "waited", 0.0) - before)


def write_cache(folder: Path, width: int, num_images: int = 64) -> tuple[Path, float]:
    """A cache of random features, and the median seconds that reading one image's takes."""
    import torch

    from laver_mcore.data.images.source import LoadedImage
    from laver_mcore.data.images.target_cache import TargetCache, TargetCacheWriter, image_key
    from laver_mcore.data.images.wanted import WantedImage

    writer = TargetCacheWriter(folder, dict(kind="dinov2", view="whole", grid=list(GRID), width=width))
    files = [f"picture {number}".encode() for number in range(num_images)]
    for file in files:
        writer.add(image_key(file), torch.randn(GRID[0] * GRID[1], width))
    writer.close()
    cache, seconds = TargetCache(folder), []
    for file in files:
        started = time.perf_counter()
        cache([WantedImage(LoadedImage("", file), 1, 1)])
        seconds.append(time.perf_counter() - started)
    return folder, statistics.median(seconds)


def measure(arguments: Arguments, folder: Path) -> dict[str, Any]:
    """Medians by objective."""
    width = round(768 / 3584 * arguments.hidden_size)
    cache, _ = write_cache(folder / "scaled", width)
    _, reading = write_cache(folder / "published", 768)
    arms = {name: Timed(arguments, section, width) for name, section in objectives(arguments, cache).items()}
    for number in tqdm(range(arguments.steps + 1), unit="turn", disable=None):
        for arm in arms.values():
            arm.step(number)
    base = statistics.median(arms["lm"].seconds[1:])
    found: dict[str, Any] = {"read_one_image_ms": 1e3 * reading}
    for name, arm in arms.items():
        seconds = arm.seconds[1:]
        pairs = [a / b for a, b in zip(seconds, arms["lm"].seconds[1:], strict=True)]
        found[name] = {
            "step_seconds": statistics.median(seconds),
            "of_lm": statistics.median(seconds) / base,
            "of_lm_turn_by_turn": [min(pairs), statistics.median(pairs), max(pairs)],
            "waited_share": sum(arm.waited[1:]) / sum(seconds),
        }
    return found


def main() -> int:
    """Measure, print, and write what was found."""
    arguments = tyro.cli(Arguments, description=__doc__)
    warnings.filterwarnings("ignore")
    import torch

    from laver_mcore.megatron import parallel

    parallel.init_distributed()
    with tempfile.TemporaryDirectory() as folder:
        found = measure(arguments, Path(folder))
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, width {arguments.hidden_size}, "
        f"{arguments.num_layers} layers, {arguments.micro_batches} micro-batches of two images of 729 tokens"
    )
    print(f"reading one image's features (256 x 768) from the cache: {found['read_one_image_ms']:.2f} ms")
    print(
        f"{'':<30}{'s / step':>9}{'of LM':>7}{'turn by turn: least, median, most':>36}{'waited for matching':>21}"
    )
    for name, row in found.items():
        if isinstance(row, dict):
            least, middle, most = row["of_lm_turn_by_turn"]
            turns = f"{least:.2f} {middle:.3f} {most:.2f}"
            print(
                f"{name:<30}{row['step_seconds']:>9.2f}{row['of_lm']:>7.3f}{turns:>36}{row['waited_share']:>21.1%}"
            )
    if arguments.output is not None:
        arguments.output.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    parallel.shut_down()
    return 0


if __name__ == "__main__":
    sys.exit(main())
