"""Five kills of `make chaos`: what the long form promises, and that it would notice a run that breaks it."""

import json

from chaos.run import differences
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
    assert found["kills_in_saves"] >= 1


def test_a_number_that_differs_is_counted():
    wanted = {1: {"loss": 2.0}, 2: {"loss": 1.5}}
    assert differences(dict(wanted), wanted) == 0
    assert differences({1: {"loss": 2.0}, 2: {"loss": 1.5000001}}, wanted) == 1
    assert differences({3: {"loss": 1.0}}, wanted) == 1  # an iteration that the other run never had
