"""Lengths and images as in published instruction sets: text alone, one image, several images, long captions."""

from pathlib import Path

import numpy as np

from laver_mcore.accounting.training_cost import training_cost
from laver_mcore.config.load import from_recipe, resolve

ROOT = Path(__file__).resolve().parents[3]
IMAGE = 729  # visual tokens: SigLIP 384/14
STAGE_2 = training_cost(  # LaVer on Qwen2.5-7B with SigLIP2, the tower frozen
    resolve(from_recipe(ROOT / "examples/qwen2.5-7b-siglip2/stage2.yaml")), 152064
)


def realistic_mix(num, seq_length, seed=0):
    """(lengths, visual tokens, sums of squares), int64 [n]: 20 % text, 50 % one image, 15 % two to six images
    (as far as they fit), 15 % long captions.
    """
    draw = np.random.default_rng(seed)
    kind = draw.choice(4, num, p=[0.2, 0.5, 0.15, 0.15])
    most = max(1, (seq_length - 500) // (IMAGE + 2))
    images = np.choose(kind, [0, 1, np.minimum(draw.integers(2, 7, num), most), 1])
    mean, spread = np.array([5.8, 4.6, 4.6, 6.3])[kind], np.array([0.9, 0.7, 0.7, 0.4])[kind]
    text = 30 + np.exp(draw.normal(mean, spread)).astype(np.int64)
    lengths = images * (IMAGE + 2) + text
    fits = lengths <= seq_length
    images, lengths = images[fits].astype(np.int64), lengths[fits]
    return lengths, images * IMAGE, images * IMAGE**2
