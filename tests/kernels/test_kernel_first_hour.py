"""The first hour's command: rehearsed at toy size, gone on with, stopped where it has to, and read at its end."""

import importlib
import sys
from pathlib import Path

import pytest
import torch
from long import LONG

BENCHMARKS = Path(__file__).resolve().parents[2] / "kernels" / "benchmarks"


@pytest.fixture
def first_hour(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    sys.modules.pop("first_hour", None)
    return importlib.import_module("first_hour")


@pytest.mark.slow
@LONG
@pytest.mark.skipif(torch.cuda.is_available(), reason="a rehearsal without a GPU")
def test_a_rehearsal_goes_through_every_step(first_hour, tmp_path, capsys):
    pytest.importorskip("triton")
    assert first_hour.main(["--rehearse", "--minutes", "10", "--output", str(tmp_path)]) == 0
    names = [step.name for step in first_hour.steps(tmp_path, 10, True)]
    out = capsys.readouterr().out
    assert all(f"{name}: ok" in out for name in names)
    assert "the checks passed, and no timing counts here" in (tmp_path / "ours.log").read_text()
    assert first_hour.main(["--rehearse", "--minutes", "10", "--output", str(tmp_path)]) == 0
    assert capsys.readouterr().out.count("done before") == len(names)


def _pretend(first_hour, monkeypatch, outcomes):
    ran = []

    def run_step(step, folder, minutes):
        ran.append((step.name, minutes))
        return {"outcome": outcomes.get(step.name, "ok"), "seconds": 1.0, "log": "x.log"}

    monkeypatch.setattr(first_hour, "run_step", run_step)
    return ran


def test_a_red_check_stops_the_hour_and_a_second_call_goes_on(first_hour, tmp_path, monkeypatch):
    ran = _pretend(first_hour, monkeypatch, {"correctness": "failed with status 1"})
    assert first_hour.main(["--output", str(tmp_path)]) == 1
    assert [name for name, _ in ran] == ["correctness"]
    ran = _pretend(first_hour, monkeypatch, {"tune": "stopped after 11.0 minutes"})
    assert first_hour.main(["--output", str(tmp_path)]) == 1
    assert [name for name, _ in ran] == [
        "correctness",
        "ours",
        "tune",
        "baselines",
        "every shape",
        "host time",
    ]
    ran = _pretend(first_hour, monkeypatch, {})
    assert first_hour.main(["--output", str(tmp_path)]) == 0
    assert [name for name, _ in ran] == ["tune"]


def test_the_minutes_bound_the_steps_together(first_hour, tmp_path, monkeypatch, capsys):
    made = first_hour.steps(tmp_path, 55, False)
    assert sum(step.share for step in made) <= 1.0 + 1e-9
    ran = _pretend(first_hour, monkeypatch, {})
    assert first_hour.main(["--output", str(tmp_path), "--minutes", "0"]) == 1
    assert not ran and "no minutes left; call again" in capsys.readouterr().out


def test_a_step_beyond_its_minutes_is_stopped(first_hour, tmp_path):
    step = first_hour.Step(
        name="long", command=(sys.executable, "-c", "import time; time.sleep(60)"), share=1.0
    )
    assert first_hour.run_step(step, tmp_path, 0.01)["outcome"] == "stopped after 0.0 minutes"


def test_measured_is_set_against_predicted(first_hour):
    row = {
        "operation": "mixed_attention",
        "case": "causal, T=8192, TP=1",
        "direction": "forward",
        "rate": 450.0,
        "peaks": {"teraflops": 800.0},
    }
    predicted = {"mixed_attention, causal, T=8192, TP=1, forward": 0.625}
    rows = [row, row | {"case": "other"}, row | {"peaks": {}}]
    assert first_hour.compare(rows, predicted) == [
        "causal, T=8192, TP=1 forward: 450 measured, 500 predicted, 0.90"
    ]


def test_predictions_are_those_of_this_gpu(first_hour, tmp_path):
    path = tmp_path / "predictions.json"
    assert first_hour.read_predictions(path, "sm_90") == {}
    path.write_text('{"sm_90": {"a, b, forward": 0.5}}')
    assert first_hour.read_predictions(path, "sm_90") == {"a, b, forward": 0.5}
    assert first_hour.read_predictions(path, "sm_80") == first_hour.read_predictions(path, None) == {}
