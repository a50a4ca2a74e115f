"""Skipped steps: who was in them is said, and too many in a row stop the run, whenever that is looked at."""

import json
from types import SimpleNamespace

import pytest
import torch

from laver_mcore.train.skips import DivergedError, Skips


def run(skips, applied, looks=False):
    for number, ok in enumerate(applied, start=1):
        batches = [
            SimpleNamespace(sample_keys=(f"a{number}", f"b{number}")),
            SimpleNamespace(sample_keys=(f"a{number}",)),
        ]
        skips.add(number, torch.tensor(bool(ok)), batches)
    if looks:
        skips.look()


@pytest.mark.parametrize(
    "applied", [[0, 0, 0], [1, 0, 0, 0], [0, 0, 1, 1, 0, 0, 0], [1] * 5 + [0] * 3], ids=str
)
def test_three_in_a_row_stop_it(applied):
    skips = Skips(3, None, speaks=False)
    with pytest.raises(
        DivergedError, match=f"3 steps in a row, up to iteration {len(applied)}, had gradients"
    ):
        run(skips, applied, looks=True)


@pytest.mark.parametrize("applied", [[0, 0, 1, 0, 0, 1], [1] * 9, [0, 1] * 5], ids=str)
def test_fewer_do_not(applied):
    skips = Skips(3, None, speaks=False)
    run(skips, applied)
    skips.look()
    skips.look()


def test_their_samples_are_named(tmp_path, capsys):
    file = tmp_path / "skipped.jsonl"
    skips = Skips(4, file, speaks=True)
    run(skips, [1, 0, 1])
    assert capsys.readouterr().out == ""  # nobody has waited for the device yet
    skips.look()
    assert (
        capsys.readouterr().out == "iteration 2 was skipped, its gradients are not finite; samples: a2, b2\n"
    )
    assert json.loads(file.read_text()) == {"iteration": 2, "samples": ["a2", "b2"]}
    silent = Skips(4, file, speaks=False)
    run(silent, [0])
    silent.look()
    assert capsys.readouterr().out == "" and len(file.read_text().splitlines()) == 1


def test_a_line_stays_short(capsys):
    skips = Skips(1000, None, speaks=True)
    skips.add(1, torch.tensor(False), [SimpleNamespace(sample_keys=tuple(map(str, range(50))))])
    skips.look()
    assert capsys.readouterr().out.endswith("samples: 0, 1, 2, 3, 4, 5, 6, 7 and 42 more\n")
