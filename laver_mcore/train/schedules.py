"""The learning rate: a pure function of the iteration, which counts from 0.

The step that turns a fresh model into iteration 1 is `iteration = 0`.
"""

import math

from laver_mcore.config.schema import OptimizerConfig


def learning_rate(config: OptimizerConfig, iteration: int, train_iters: int) -> float:
    """Linear warm-up to `lr`, then cosine, linear or constant decay to `min_lr` at the end of the run."""
    warmup = config.lr_warmup_iters
    if iteration < warmup:
        return config.lr * (iteration + 1) / warmup
    if config.lr_decay_style == "constant" or train_iters <= warmup:
        return config.lr
    progress = min(1.0, (iteration - warmup) / (train_iters - warmup))
    if config.lr_decay_style == "linear":
        return config.lr + (config.min_lr - config.lr) * progress
    return config.min_lr + 0.5 * (config.lr - config.min_lr) * (1.0 + math.cos(math.pi * progress))
