"""Lengths and images as in published instruction sets: text alone, one image, several images, long captions."""

import numpy as np

from laver_mcore.data.cost import PackingCost, TransformerShape, packing_cost

IMAGE = 729  # visual tokens: SigLIP 384/14

QWEN_7B = TransformerShape.of(
    num_layers=28,
    hidden_size=3584,
    num_heads=28,
    num_key_heads=4,
    head_dim=128,
    ffn_size=18944,
    ffn_matrices=3,
)
SO400M = TransformerShape.of(
    num_layers=27,
    hidden_size=1152,
    num_heads=16,
    num_key_heads=16,
    head_dim=72,
    ffn_size=4304,
    ffn_matrices=2,
)
STAGE_2: PackingCost = packing_cost(  # LaVer on Qwen2.5-7B with SigLIP2, the tower frozen
    QWEN_7B,
    lm_head=3584 * 152064,
    mixed=True,
    vision_head=2 * 3584 * 2048 + 2048**2,
    gram_width=3584,
    tower=SO400M,
    tower_trains=False,
    patches_per_token=1,
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
