"""The examples run and do what they say."""

import runpy
from pathlib import Path

EXAMPLES = Path(__file__).resolve().parents[2] / "kernels" / "examples"


def test_a_flex_attention_mask_as_intervals():
    assert runpy.run_path(str(EXAMPLES / "flex_attention_mask.py"))["main"]() < 1e-5


def test_gram_anchoring():
    losses = runpy.run_path(str(EXAMPLES / "gram_anchoring.py"))["main"]()
    assert losses[-1] < 0.5 * losses[0]
