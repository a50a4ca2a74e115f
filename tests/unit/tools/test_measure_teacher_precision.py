"""What the tool says about two sets of targets, by hand; and to bad input."""

import math

import pytest
import torch
from sample_run import write_recipe, write_sample_data

from tools.measure_teacher_precision import COLUMNS, compare, main

# Temperature 1: logits are log-probabilities, so p = (1/2, 1/2) against q = (1/4, 3/4), and equal ones.
LOG = torch.tensor([[0.5, 0.5], [0.25, 0.75]], dtype=torch.float64).log()
SAID = {
    "other": (
        LOG[1:],
        LOG[:1],
        (
            math.dist(LOG[1].tolist(), LOG[0].tolist()) / math.hypot(*LOG[0].tolist()),
            sum(LOG.prod(0).tolist()) / math.hypot(*LOG[0].tolist()) / math.hypot(*LOG[1].tolist()),
            0.5 * math.log(2) + 0.5 * math.log(2 / 3),
            0.25,
            0.0,
        ),
    ),
    "equal": (LOG, LOG, (0.0, 1.0, 0.0, 0.0, 1.0)),
}


@pytest.mark.parametrize(("got", "wanted", "said"), SAID.values(), ids=SAID)
def test_compares_targets(got, wanted, said):
    assert len(said) == len(COLUMNS)
    assert compare(got, wanted, 1.0) == pytest.approx(said, abs=1e-12)


def test_temperature_sharpens():
    assert compare(LOG[1:], LOG[:1], 0.04)[2] > 5 * compare(LOG[1:], LOG[:1], 1.0)[2]


def test_bad_input_is_one_line(tmp_path, capsys):
    write_sample_data(tmp_path, num_samples=4)
    recipe = write_recipe(tmp_path)
    assert main(["--config", str(recipe), "--ffn-hidden-size", "136"]) == 2
    said = capsys.readouterr().err.strip()
    assert "teacher_precision=fp8 needs multiples of 16" in said
    assert "\n" not in said
