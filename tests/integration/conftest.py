"""The runs that the layout tests compare: one recipe under every parallel layout, trained once for the session."""

from pathlib import Path

import pytest
from sample_run import write_recipe, write_sample_data

from integration.harness import Scenario, run_scenarios

ITERATIONS = 5

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

# Variants of the recipe, each under several layouts: edge cases of the data and of the objective.
VARIANTS: dict[str, str] = {
    "one_token": "--image-size 8 --patch-size 8",
    "text_rows": "--data-path {directory}/text_rows.json",
    "released": "--gram ga --gram-scope micro_batch --mask-draw bernoulli --no-mixed-attention --no-rope-2d",
    "lm_only": "--no-laver",
}
VARIANT_LAYOUTS = ("tp1", "tp2_sp", "pp2", "dp2_distributed")

# Resume: four iterations under one layout, four more under another.
FIRST_HALF = ("tp2", "dp2_distributed")
SECOND_HALF = {
    "tp2": ("tp2", "tp1", "pp2", "tp2_pp2"),
    "dp2_distributed": ("dp2_distributed", "tp2_sp", "tp1", "pp2_interleaved", "dp2_tp2_sp_distributed"),
}


@pytest.fixture(scope="session")
def data_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("data")
    write_sample_data(directory)
    write_recipe(directory)
    return directory


def _argv(directory: Path, layout: str, extra: str, iterations: int) -> tuple[str, ...]:
    flags = f"{LAYOUTS[layout][1]} {extra.format(directory=directory)}"
    return ("--config", str(directory / "recipe.yaml"), "--train-iters", str(iterations), *flags.split())


@pytest.fixture(scope="session")
def runs(data_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with one run per layout, per variant and per resume."""
    directory = tmp_path_factory.mktemp("runs")
    scenarios: dict[int, list[Scenario]] = {1: [], 2: [], 4: []}
    for layout, (ranks, _) in LAYOUTS.items():
        scenarios[ranks].append(Scenario(name=layout, argv=_argv(data_directory, layout, "", ITERATIONS)))
    for variant, extra in VARIANTS.items():
        for layout in VARIANT_LAYOUTS:
            argv = _argv(data_directory, layout, extra, 3)
            scenarios[LAYOUTS[layout][0]].append(Scenario(name=f"{variant}-{layout}", argv=argv))
    for first in FIRST_HALF:
        whole = _argv(data_directory, first, "", 8)
        scenarios[2].append(Scenario(name=f"whole-{first}", argv=whole))
        scenarios[2].append(Scenario(name=f"half-{first}", argv=(*whole, "--exit-interval", "4")))
    second: dict[int, list[Scenario]] = {1: [], 2: [], 4: []}
    for first, continuations in SECOND_HALF.items():
        for layout in continuations:
            load = ("--load", str(directory / f"half-{first}"))
            extra = "--use-distributed-optimizer" if "distributed" in first else ""
            argv = (*_argv(data_directory, layout, extra, 8), *load)
            second[LAYOUTS[layout][0]].append(Scenario(name=f"resumed-{first}-{layout}", argv=argv))
    for ranks in (2, 1, 4):
        run_scenarios(ranks, directory, scenarios[ranks] + (second[ranks] if ranks != 2 else []))
        if ranks == 2:
            run_scenarios(ranks, directory, second[ranks])
    return directory
