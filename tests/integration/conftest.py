"""The runs that the layout tests compare: one recipe under many parallel layouts, trained once for the session."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import pytest
from sample_run import write_recipe, write_sample_data

from integration.harness import Scenario, run_scenarios

ITERATIONS = 5

# Layouts add in different orders, so their gradients differ by rounding, and Adam moves a weight by g / (sqrt(v) + eps)
# times the rate: where g is nothing but rounding (the vision head's before the first masks, while student and teacher
# are the same), a small epsilon makes a whole move of it, another one under every layout and on every processor. With
# this one, a tenth of a typical gradient, a move is at most g times the rate over epsilon, and rounding stays rounding.
STEADY = "--adam-eps 1e-3"

# Name -> (ranks, flags). Every one trains the same recipe on the same rows.
LAYOUTS: dict[str, tuple[int, str]] = {
    "tp1": (1, ""),
    "recompute_full": (1, "--recompute-granularity full"),
    "micro_batch_2": (1, "--micro-batch-size 2"),
    "tp2": (2, "--tensor-model-parallel-size 2"),
    "tp2_sp": (2, "--tensor-model-parallel-size 2 --sequence-parallel --recompute-granularity selective"),
    "pp2": (2, "--pipeline-model-parallel-size 2"),
    "pp2_interleaved": (2, "--pipeline-model-parallel-size 2 --num-virtual-stages-per-pipeline-rank 2"),
    "dp2": (2, "--overlap-grad-reduce"),
    "dp2_distributed": (2, "--use-distributed-optimizer"),
    "dp2_distributed_offload": (2, "--use-distributed-optimizer --overlap-grad-reduce --offload-teacher"),
    "tp2_pp2": (4, "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2"),
    "dp2_tp2": (4, "--tensor-model-parallel-size 2"),
    "dp2_tp2_sp_distributed": (
        4,
        "--tensor-model-parallel-size 2 --sequence-parallel --use-distributed-optimizer --recompute-granularity full",
    ),
    "dp2_distributed_overlap": (
        2,
        "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather",
    ),
    "cp2": (2, "--context-parallel-size 2"),
    "cp2_distributed": (
        2,
        "--context-parallel-size 2 --use-distributed-optimizer --recompute-granularity full",
    ),
    "cp2_tp2_sp": (4, "--context-parallel-size 2 --tensor-model-parallel-size 2 --sequence-parallel"),
    "cp2_pp2_distributed": (
        4,
        "--context-parallel-size 2 --pipeline-model-parallel-size 2 --use-distributed-optimizer",
    ),
    "cp4": (4, "--context-parallel-size 4"),
    "dp2_pp2_distributed": (4, "--pipeline-model-parallel-size 2 --use-distributed-optimizer"),
}

# Combinations of what the others train by itself: `make test-long`.
LONG_LAYOUTS = {
    "micro_batch_2",
    "dp2_distributed_offload",
    "dp2_tp2",
    "cp2_distributed",
    "cp4",
    "dp2_pp2_distributed",
}

# Variants of the recipe, each under several layouts: edge cases of the data and of the objective.
VARIANTS: dict[str, str] = {
    "one_token": "--image-size 8 --patch-size 8",
    "text_rows": "--data-path {directory}/text_rows.json",
    "released": "--gram ga --gram-scope micro_batch --mask-draw bernoulli --no-mixed-attention --no-rope-2d",
    "lm_only": "--objective lm",
    "qwen3": "--family qwen3 --kv-channels 24",
    "llama3.1": "--family llama --rope-scaling 8 1 4 16",
}
VARIANT_LAYOUTS = ("tp1", "tp2_sp", "pp2", "dp2_distributed")
LONG_VARIANTS = {
    ("one_token", "pp2"),
    ("released", "pp2"),
    ("lm_only", "tp2_sp"),
    ("lm_only", "dp2_distributed"),
}
LONG_VARIANTS |= {
    (decoder, layout) for decoder in ("qwen3", "llama3.1") for layout in ("pp2", "dp2_distributed")
}

# Resume: four iterations under one layout, four more under another.
FIRST_HALF = ("tp2", "dp2_distributed")
SECOND_HALF = {
    "tp2": ("tp2", "tp1", "pp2", "tp2_pp2"),
    "dp2_distributed": ("dp2_distributed", "tp2_sp", "tp1", "pp2_interleaved", "dp2_tp2_sp_distributed"),
}


@dataclass(frozen=True, kw_only=True)
class Run:
    """One training run of the table below."""

    layout: str
    flags: str
    iterations: int
    continues: str | None = None
    """The run whose checkpoint it starts from."""

    @property
    def ranks(self) -> int:
        return LAYOUTS[self.layout][0]

    def scenario(self, name: str, data: Path, runs: Path) -> Scenario:
        flags = f"{STEADY} {LAYOUTS[self.layout][1]} {self.flags.format(directory=data)}"
        argv = ["--config", str(data / "recipe.yaml"), "--train-iters", str(self.iterations), *flags.split()]
        if self.continues is not None:
            argv += ["--load", str(runs / self.continues)]
        return Scenario(name=name, argv=tuple(argv))


def _table() -> dict[str, Run]:
    # Checkpoints of the first steps hold their gradients.
    runs = {name: Run(layout=name, flags="--save-interval 1", iterations=ITERATIONS) for name in LAYOUTS}
    for variant, flags in VARIANTS.items():
        for layout in VARIANT_LAYOUTS:
            runs[f"{variant}-{layout}"] = Run(layout=layout, flags=flags, iterations=3)
    for first, continuations in SECOND_HALF.items():
        runs[f"whole-{first}"] = Run(layout=first, flags="", iterations=8)
        runs[f"half-{first}"] = Run(layout=first, flags="--exit-interval 4", iterations=8)
        optimizer = "--use-distributed-optimizer" if "distributed" in first else ""
        for second in continuations:
            runs[f"resumed-{first}-{second}"] = Run(
                layout=second, flags=optimizer, iterations=8, continues=f"half-{first}"
            )
    return runs


RUNS = _table()


def needs(*runs: str) -> pytest.MarkDecorator:
    """Marks a test, or one of its parameters, with the runs of the table that it reads."""
    assert set(runs) <= set(RUNS), runs
    return pytest.mark.needs_runs(*runs)


def with_what_they_continue(names: Iterable[str]) -> dict[str, Run]:
    """The runs of these names and those that they start from, in the table's order."""
    wanted = set(names)
    wanted |= {first for name in wanted if (first := RUNS[name].continues) is not None}
    return {name: run for name, run in RUNS.items() if name in wanted}


@pytest.fixture(scope="session")
def data_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("data")
    write_sample_data(directory)
    write_recipe(directory)
    return directory


@pytest.fixture(scope="session")
def runs(
    request: pytest.FixtureRequest, data_directory: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Folder with the runs that the selected tests need, trained in one launch for each number of ranks."""
    directory = tmp_path_factory.mktemp("runs")
    items = [item for item in request.session.items if not item.get_closest_marker("skip")]
    marks = [mark for item in items for mark in item.iter_markers("needs_runs")]
    chosen = with_what_they_continue(name for mark in marks for name in mark.args)
    # Two ranks first: others continue their runs.
    for ranks in (2, 1, 4):
        scenarios = [
            run.scenario(name, data_directory, directory)
            for name, run in chosen.items()
            if run.ranks == ranks
        ]
        if scenarios:
            run_scenarios(ranks, directory, scenarios)
    return directory
