"""Five kills of `make chaos`, and one that torchrun mends by itself; a run that breaks what is promised is noticed."""

import json
import os
import signal

import pytest
from chaos.run import LAYOUTS, Run, differences, finish, ranks, rows_of, wait
from long import LONG

from integration.harness import python


@LONG
def test_five_kills_lose_nothing(tmp_path):
    done = python(
        "tests/chaos/run.py", "--kills", "5", "--layouts", "dp2", "--out", str(tmp_path), timeout=400
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    found = json.loads((tmp_path / "summary.json").read_text())
    assert found["kills"] == found["restarts"] == 5
    assert found["mismatches"] == found["leftovers"] == 0
    assert found["most_lost"] <= found["save_interval"]
    assert found["most_lost_beside"] <= 2 * found["save_interval"]
    assert found["kills_in_saves"] >= 1


@LONG
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank_is_restarted_within_the_job(data_directory, tmp_path, victim):
    """By torchrun, which keeps its store: the next ranks must not believe what the last ones wrote there."""
    found = {}
    for name, kills in (("calm", 0), ("killed", 2)):
        run = Run(tmp_path / name, data_directory / "recipe.yaml", LAYOUTS["dp2"], 20)
        process = run.start(restarts=kills)
        for kill in range(kills):
            wait(lambda run=run, goal=5 + 7 * kill: max(rows_of(run.folder), default=0) >= goal, process)
            os.kill(ranks(process.pid)[victim], signal.SIGKILL)
        finish(run, process)
        assert run.leftovers() == 0
        found[name] = rows_of(run.folder)
        assert run.folder.with_suffix(".log").read_text().count("resumed from") == kills
    assert sorted(found["killed"]) == list(range(1, 21))
    assert differences(found["killed"], found["calm"]) == 0


def test_a_number_that_differs_is_counted():
    wanted = {1: {"loss": 2.0}, 2: {"loss": 1.5}}
    assert differences(dict(wanted), wanted) == 0
    assert differences({1: {"loss": 2.0}, 2: {"loss": 1.5000001}}, wanted) == 1
    assert differences({3: {"loss": 1.0}}, wanted) == 1  # an iteration that the other run never had
