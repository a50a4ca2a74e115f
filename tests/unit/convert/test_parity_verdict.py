"""When logits of two implementations count as the same: by what fp32 rounds at their scale."""

import math

import pytest

from laver_mcore.convert.parity import Comparison, Difference

# Largest difference, largest logit, difference of the losses -> the same, at a tolerance of 1e-4.
VERDICTS = {
    "wide model, large logits": (3e-4, 20.0, 0.0, True),
    "another model": (3e-3, 20.0, 0.0, False),
    "small logits": (3e-5, 0.05, 0.0, False),
    "losses apart": (0.0, 20.0, 2e-4, False),
    "no number": (math.nan, 20.0, 0.0, False),
    "all zero": (0.0, 0.0, 0.0, True),
}


@pytest.mark.parametrize(("difference", "magnitude", "losses", "same"), VERDICTS.values(), ids=VERDICTS)
def test_logits_agree_in_units_of_the_largest(difference, magnitude, losses, same):
    found = Comparison(
        name="text",
        logits=Difference(difference=difference, magnitude=magnitude),
        layers=(),
        engine_loss=2.0 + losses,
        reference_loss=2.0,
    )
    assert found.passes(1e-4) == same
