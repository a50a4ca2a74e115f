"""The page of a step: what it holds, and that mask and grid are drawn where they belong."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("inspect_data", ROOT / "tools" / "inspect_data.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_masked_tokens_are_red_and_others_are_not(tool):
    mask = np.array([True, False, False, False, False, True])
    picture = np.asarray(tool.draw_picture(Image.new("RGB", (60, 40), "blue"), (2, 3), mask, longest=60))
    centres = picture[[10, 10, 10, 30, 30, 30], [10, 30, 50, 10, 30, 50]]
    assert (centres[:, 0] > 100).tolist() == mask.tolist()


class Letters:
    """One character a token; id 0 is the visual token."""

    class special:
        image_pad = 0

    def decode(self, ids, *, skip_special_tokens=True):
        return "".join(map(chr, ids))


def test_learned_text_is_marked_and_visual_tokens_are_counted(tool):
    tokens = [*map(ord, "a<"), 0, 0, 0, *map(ord, "bcd")]
    labels = [-100] * 5 + [ord("c"), ord("d"), -100]  # of the next token
    assert tool.document_html(tokens, labels, Letters()) == ("a&lt;<b>[3 visual tokens]</b>b<mark>cd</mark>")
