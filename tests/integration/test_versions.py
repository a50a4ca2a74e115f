"""One recipe under two versions of Megatron-Core and Python: the same numbers, and checkpoints that go both ways.

`make test-matrix` runs it, with an environment of the newest versions beside the usual one.
"""

import json
import os
import sys

import pytest
from sample_run import write_recipe, write_sample_data

from integration.conftest import STEADY
from integration.harness import Scenario, python, read_checkpoint, read_metrics, run_scenarios
from integration.test_layouts import assert_same_curves, assert_same_tensors

NEWEST = os.environ.get("LAVER_NEWEST", "")
pytestmark = pytest.mark.skipif(
    not NEWEST, reason="needs an environment of the newest versions: make test-matrix"
)
SIDES = {"usual": sys.executable, "newest": NEWEST}
LAYOUTS = {"dp2_distributed": "--use-distributed-optimizer", "tp2": "--tensor-model-parallel-size 2"}
ITERATIONS = 5


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Each layout whole and half on both sides, then each half gone on with on the other side."""
    directory = tmp_path_factory.mktemp("versions")
    write_sample_data(directory, num_samples=48)
    shared = f"--config {write_recipe(directory)} {STEADY} --train-iters {ITERATIONS}"

    def scenario(name, flags):
        return Scenario(name=name, argv=tuple(f"{shared} {flags}".split()))

    for side, interpreter in SIDES.items():
        wholes = [scenario(f"{side}-{name}", flags) for name, flags in LAYOUTS.items()]
        halves = [
            scenario(f"{side}-{name}-half", f"{flags} --exit-interval 2") for name, flags in LAYOUTS.items()
        ]
        run_scenarios(2, directory, wholes + halves, interpreter)
    for side, other in (("usual", "newest"), ("newest", "usual")):
        rest = [
            scenario(f"{side}-after-{other}-{name}", f"{flags} --load {directory}/{other}-{name}-half")
            for name, flags in LAYOUTS.items()
        ]
        run_scenarios(2, directory, rest, SIDES[side])
    return directory


def test_the_versions_are_two():
    ask = "import json, megatron.core, sys; print(json.dumps([megatron.core.__version__, sys.version_info[:2]]))"
    versions = [
        json.loads(python("-c", ask, interpreter=each).stdout.splitlines()[-1]) for each in SIDES.values()
    ]
    assert versions[0][0] != versions[1][0]
    assert versions[0][1] != versions[1][1]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_losses_and_moments_are_the_same(runs, layout):
    usual, newest = (runs / f"{side}-{layout}" for side in SIDES)
    assert_same_curves(read_metrics(newest), read_metrics(usual))
    for prefix in ("optimizer.state.exp_avg.", "optimizer.state.exp_avg_sq.", "teacher"):
        wanted = read_checkpoint(usual, prefix)
        assert len(wanted) >= 15
        assert_same_tensors(read_checkpoint(newest, prefix), wanted, 1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("side", "other"), [("usual", "newest"), ("newest", "usual")])
def test_a_run_goes_on_under_the_other(runs, side, other, layout):
    resumed = read_metrics(runs / f"{side}-after-{other}-{layout}")
    assert [row["iteration"] for row in resumed] == [3, 4, 5]
    assert_same_curves(resumed, read_metrics(runs / f"{side}-{layout}")[2:])
