"""Two steps through each native tower, alike in one process, under TP 2 and under PP 2."""

import json
import math

import pytest
from PIL import Image
from sample_run import write_recipe, write_sample_data
from unit.model.test_native_encoders import CONFIGS, write_directory

from integration.harness import Scenario, read_metrics, run_scenarios

LAYOUTS = {
    "tp1": (1, ""),
    "tp2": (2, "--tensor-model-parallel-size 2"),
    "pp2": (2, "--pipeline-model-parallel-size 2"),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    directory = tmp_path_factory.mktemp("native")
    write_sample_data(directory, num_samples=8)
    for index, file in enumerate(sorted(directory.glob("*.png"))):
        Image.open(file).resize((16 + 8 * (index % 3), 24 + 8 * (index % 2))).save(file)  # many grids
    recipe = write_recipe(directory)
    scenarios = {1: [], 2: []}
    for kind in CONFIGS:
        write_directory(directory / kind, kind)
        for layout, (ranks, flags) in LAYOUTS.items():
            argv = f"--config {recipe} --vision {kind} --vision-path {directory / kind} --vision-random-init"
            argv += f" --train-iters 2 {flags}"
            scenarios[ranks].append(Scenario(name=f"{kind}-{layout}", argv=tuple(argv.split())))
    for ranks, members in scenarios.items():
        run_scenarios(ranks, directory, members)
    return directory


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", CONFIGS)
def test_two_steps(runs, kind, layout):
    rows, reference = read_metrics(runs / f"{kind}-{layout}"), read_metrics(runs / f"{kind}-tp1")
    assert len(rows) == 2
    for row, wanted in zip(rows, reference, strict=True):
        for name in ("lm_loss", "mim_loss", "gram_loss", "grad_norm"):
            assert math.isclose(row[name], wanted[name], rel_tol=1e-4, abs_tol=1e-6), json.dumps(
                [row, wanted]
            )
    assert min(rows[-1][name] for name in ("lm_loss", "mim_loss", "grad_norm")) > 0
