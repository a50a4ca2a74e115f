"""Settings of image processors as others leave them: equal pixels, or one line with the file."""

import json
import random

import numpy as np
import pytest
from corpora import picture

from laver_mcore.data.errors import DataError
from laver_mcore.data.images.native import NativeImageProcessor
from laver_mcore.data.images.processors import FixedImageProcessor

FIXED = {
    "image_processor_type": "SiglipImageProcessor",
    "size": {"height": 28, "width": 28},
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "resample": 3,
    "do_resize": True,
    "do_rescale": True,
    "do_normalize": True,
    "rescale_factor": 1 / 255,
}
NATIVE = FIXED | {
    "image_processor_type": "Qwen2VLImageProcessor",
    "size": {"shortest_edge": 64, "longest_edge": 4096},
    "patch_size": 7,
    "merge_size": 2,
    "temporal_patch_size": 1,
}
REFUSED = {
    "size null": {"size": None},
    "size a word": {"size": "big"},
    "size zero": {"size": {"height": 0, "width": 28}},
    "size negative": {"size": {"height": -28, "width": 28}},
    "mean null": {"image_mean": None},
    "mean of one": {"image_mean": [0.5]},
    "mean NaN": {"image_mean": [float("nan")] * 3},
    "std 0": {"image_std": [0.0, 0.5, 0.5]},
    "std a number": {"image_std": 0},
    "resample a word": {"resample": "bicubic"},
    "resample unknown": {"resample": 17},
    "no rescale factor": {"rescale_factor": None},
    "rescale by infinity": {"rescale_factor": float("inf")},
}


def build(kind, path):
    return FixedImageProcessor(path, patch_size=7) if kind == "fixed" else NativeImageProcessor(path)


@pytest.mark.parametrize("change", REFUSED.values(), ids=REFUSED)
def test_refused(change, tmp_path):
    file = tmp_path / "preprocessor_config.json"
    file.write_text(json.dumps(FIXED | change))
    with pytest.raises(DataError) as caught:
        build("fixed", file)
    assert str(caught.value).startswith(str(file))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", ["[]", "null", "3", '"x"', "{", "{}"])
def test_no_settings_at_all(content, tmp_path):
    (tmp_path / "preprocessor_config.json").write_text(content)
    for kind in ("fixed", "native"):
        with pytest.raises(DataError):
            build(kind, tmp_path)


VALUES = [
    None,
    0,
    -1,
    1,
    7,
    0.5,
    float("nan"),
    float("inf"),
    "x",
    "",
    [],
    [0.5],
    [0.5] * 3,
    {},
    True,
    {"height": 14},
]


@pytest.mark.parametrize("kind", ["fixed", "native"])
def test_fuzzed_settings_give_finite_pixels_or_one_line(kind):
    draw = random.Random(0)
    picture_, base, accepted = picture(), FIXED if kind == "fixed" else NATIVE, 0
    for _ in range(300):
        config = dict(base)
        for name in draw.sample(sorted(base), 2):
            config[name] = draw.choice(VALUES)
        try:
            pixels = build(kind, config)([picture_])
        except DataError:
            continue
        accepted += 1
        assert np.isfinite(pixels.numpy()).all(), config
    assert accepted
