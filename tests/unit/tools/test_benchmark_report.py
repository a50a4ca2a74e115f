"""The training benchmark's numbers from invented measurements, worked out by hand."""

import pytest

from tools.training_benchmark.account import Account
from tools.training_benchmark.measure import Measured
from tools.training_benchmark.report import ratio, ratios, row

ACCOUNTS = {
    "lm": Account(dialogue_tokens=1000, images=4, useful_flops=2e12, executed_flops=3e12, packed_rows=1100),
    "laver": Account(
        dialogue_tokens=1000, images=4, useful_flops=5e12, executed_flops=6e12, packed_rows=1900
    ),
    "released": Account(
        dialogue_tokens=1000, images=4, useful_flops=5e12, executed_flops=24e12, packed_rows=9000
    ),
}
MEASURED = {
    "lm": Measured(rounds=[[1.0, 2.0, 3.0], [4.0, 4.0, 4.0]], peak_bytes=100, counted_flops=4e12),
    "laver": Measured(
        rounds=[[6.0, 6.0, 9.0], [10.0, 9.0, 8.0]],
        peak_bytes=150,
        counted_flops=8e12,
        teacher_moves=[11.0, 15.0, 12.0],
    ),
    "released": Measured(rounds=[[30.0, 24.0, 18.0]], peak_bytes=300, counted_flops=None),
}


def test_row():
    """The median of all timed steps, 8.5 s, is what every rate is over."""
    found = row("laver", MEASURED["laver"], ACCOUNTS["laver"], peak=4.0)
    assert found == {
        "arm": "laver",
        "step_ms": 8500.0,
        "step_ms_range": [6000.0, 10000.0],
        "timed_steps": 6,
        "teacher_move_step_ms": 12000.0,
        "tokens_per_second": pytest.approx(1000 / 8.5),
        "images_per_second": pytest.approx(4 / 8.5),
        "peak_bytes": 150,
        "useful_tflop": 5.0,
        "executed_tflop": 6.0,
        "counted_tflop": 8.0,
        "language_model_rows": 1900,
        "useful_tflops_per_second": pytest.approx(5 / 8.5),
        "mfu": pytest.approx(5 / 8.5 / 4),
    }


def test_nothing_is_said_of_what_is_unknown():
    found = row("released", MEASURED["released"], ACCOUNTS["released"], peak=None)
    assert (found["mfu"], found["counted_tflop"], found["teacher_move_step_ms"]) == (None, None, None)


def test_a_ratio_is_the_median_over_rounds():
    """Medians of rounds: 6 / 2 and 9 / 4; a round that only one arm has does not count."""
    found = ratio(MEASURED["laver"], MEASURED["lm"])
    assert found == {"median": (3 + 2.25) / 2, "least": 2.25, "most": 3.0}
    assert ratio(MEASURED["released"], MEASURED["laver"]) == {"median": 4.0, "least": 4.0, "most": 4.0}


def test_ratios():
    found = ratios(MEASURED, ACCOUNTS)
    laver, released = found["laver_over_lm"], found["released_over_laver"]
    wanted = dict(
        account_useful=2.5, account_executed=2.0, counted=2.0, memory=1.5, time_over_account=2.625 / 2.5
    )
    assert {name: laver[name] for name in wanted} == wanted
    assert (released["account_executed"], released["counted"], released["memory"]) == (4.0, None, 2.0)
    assert set(ratios({"lm": MEASURED["lm"], "released": MEASURED["released"]}, ACCOUNTS)) == set()
