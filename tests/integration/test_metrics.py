"""What a run says about its own speed, and the trace of `--profile`, on a real run."""

import json

import pytest
from sample_run import write_recipe, write_sample_data

from integration.harness import Scenario, read_metrics, run_scenarios
from laver_mcore.accounting.flops import step_flops
from laver_mcore.accounting.work import StepWork
from laver_mcore.config.load import parse

RANGES = ("vision", "teacher", "student", "optimizer", "ema")
PARTS = ("data", *RANGES, "other")
MICRO_BATCHES = 4  # of one row, in the sample recipe
FLAGS = "--train-iters 4 --log-interval 2 --profile --profile-step-start 2 --profile-step-end 4 --ema-steps 1"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    directory = tmp_path_factory.mktemp("metrics")
    write_sample_data(directory, num_samples=12)
    recipe = write_recipe(directory)
    plain = f"--config {recipe} {FLAGS}"
    scenarios = [
        Scenario(name="plain", argv=tuple(plain.split())),
        Scenario(name="peak", argv=tuple(f"{plain} --peak-tflops 2".split())),
    ]
    run_scenarios(1, directory, scenarios)
    return directory


@pytest.mark.parametrize("name", ["plain", "peak"])
def test_parts_make_up_the_step(runs, name):
    rows = read_metrics(runs / name)
    assert [row["iteration"] for row in rows] == [2, 4]
    for row in rows:
        times = {part: row[f"time_{part}_ms"] for part in PARTS}
        assert min(times.values()) >= 0
        assert min(times[part] for part in ("teacher", "student", "optimizer", "ema")) > 0
        assert times["student"] == max(
            times[part] for part in RANGES
        )  # starting and writing a trace is `other`
        step = 1000 * row["step_seconds"]
        assert sum(times.values()) == pytest.approx(step, rel=0.01)


def test_shares_of_the_peak(runs):
    plain, peak = read_metrics(runs / "plain")[-1], read_metrics(runs / "peak")[-1]
    assert plain["mfu"] is None
    assert plain["hfu"] is None
    assert plain["tflops_per_gpu"] > 0
    assert peak["mfu"] == pytest.approx(peak["tflops_per_gpu"] / 2)
    assert peak["hfu"] > peak["mfu"]
    assert 0 < plain["padding_share"] < 1


def test_rate_is_work_over_time(runs):
    """Dialogue rows alone bound the FLOPs from below, twice their parameters' worth per useful row from above."""
    row = read_metrics(runs / "plain")[-1]
    config, _ = parse(["--config", str(runs / "plain" / "config.yaml")])
    tokens = row["tokens_per_second"]
    floor = step_flops(config, 96, StepWork(dialogue_rows=1_000_000)).dialogue.model / 1e6 * tokens / 1e12
    assert floor < row["tflops_per_gpu"] < 4 * floor


@pytest.mark.parametrize("name", ["plain"])
def test_trace_names_the_parts(runs, name):
    (file,) = (runs / name / "profile").iterdir()
    assert file.name == "rank0.pt.trace.json"
    events = json.loads(file.read_text())["traceEvents"]
    spans = {
        part: [
            (e["ts"], e["ts"] + e["dur"])
            for e in events
            if e.get("name") == part and e.get("ph") == "X" and "user_annotation" in e["cat"]
        ]
        for part in RANGES
    }
    for part in ("student", "optimizer", "ema"):
        assert len(spans[part]) == 2, part  # iterations 2 and 3
    for part in ("vision", "teacher"):  # once a micro-batch, within the student's pass
        assert 2 <= len(spans[part]) <= 2 * MICRO_BATCHES, part
        for start, stop in spans[part]:
            assert any(first <= start and stop <= last for first, last in spans["student"]), part


def test_line_in_megatrons_form():
    from laver_mcore.metrics import format_iteration_line

    row = {"iteration": 3, "learning_rate": 1e-3, "skipped": 0, "tflops_per_gpu": 412.34, "loss": 1.0}
    line = format_iteration_line(row, 10, 4, 0.5)
    assert "| throughput per GPU (TFLOP/s/GPU): 412.3 |" in line
    assert "elapsed time per iteration (ms): 500.0 |" in line
