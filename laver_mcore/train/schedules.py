"""Pure functions of the iteration: learning rate, momentum, mask ratio, and when the teacher moves.

Iterations count from 0 here: the step that turns a fresh model into iteration 1 is `iteration = 0`.
Source: LaVer (arXiv 2512.06281), section 3 and its released schedules; `method.md` of the design notes.
"""

import math
from dataclasses import dataclass

from laver_mcore.config.objectives import reconstructs
from laver_mcore.config.schema import Config, LaverConfig, OptimizerConfig

CONSTANT_MASK_START = 0.125
"""Share of the run during which the constant strategy does not mask yet."""


@dataclass(frozen=True, kw_only=True)
class Knobs:
    """Everything that changes from step to step, decided before the step and passed to it."""

    iteration: int
    learning_rate: float
    mask_ratio: float
    momentum: float
    update_teacher: bool


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


def mask_ratio(config: LaverConfig, iteration: int, train_iters: int) -> float:
    """Share of visual tokens masked at `iteration`: cosine 0 -> r, or r after the first eighth of the run."""
    progress = iteration / train_iters
    if config.mask_strategy == "cosine":
        return config.mask_ratio * (1.0 - math.cos(math.pi * progress)) / 2.0
    return 0.0 if progress < CONSTANT_MASK_START else config.mask_ratio


def momentum(config: LaverConfig, iteration: int, train_iters: int) -> float:
    """EMA momentum at `iteration`: cosine m -> 1, or m throughout."""
    if config.momentum_strategy == "constant":
        return config.momentum
    return 1.0 - (1.0 - config.momentum) * (1.0 + math.cos(math.pi * iteration / train_iters)) / 2.0


def ema_steps(config: LaverConfig, train_iters: int) -> int:
    """Iterations between two moves of the teacher: `ema_steps`, else `max(1, int(T * ema_ratio))`."""
    return config.ema_steps or max(1, int(train_iters * config.ema_ratio))


def at(config: Config, iteration: int) -> Knobs:
    """All knobs of the step that follows `iteration` finished ones."""
    total = config.train.train_iters
    laver, teaches = config.laver, reconstructs(config)
    return Knobs(
        iteration=iteration,
        learning_rate=learning_rate(config.optimizer, iteration, total),
        mask_ratio=mask_ratio(laver, iteration, total) if teaches else 0.0,
        momentum=momentum(laver, iteration, total) if teaches else 1.0,
        update_teacher=teaches and (iteration + 1) % ema_steps(laver, total) == 0,
    )
