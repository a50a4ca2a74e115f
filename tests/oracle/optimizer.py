"""AdamW, gradient clipping and the learning rate, as published."""

import math
from dataclasses import dataclass, field

import torch


@dataclass(frozen=True, kw_only=True)
class AdamW:
    """Settings of AdamW (arXiv 1711.05101) with linear warm-up and cosine decay."""

    lr: float
    min_lr: float
    warmup: int
    weight_decay: float
    beta1: float
    beta2: float
    epsilon: float
    clip: float

    def rate(self, iteration: int, total: int) -> float:
        """Learning rate of the step after `iteration` finished ones."""
        if iteration < self.warmup:
            return self.lr * (iteration + 1) / self.warmup
        share = (iteration - self.warmup) / (total - self.warmup)
        return self.min_lr + (self.lr - self.min_lr) * (1 + math.cos(math.pi * share)) / 2


@dataclass
class Moments:
    """First and second moments of every parameter, and the steps taken."""

    first: dict[str, torch.Tensor] = field(default_factory=dict)
    second: dict[str, torch.Tensor] = field(default_factory=dict)
    steps: int = 0


def is_decayed(name: str, weight: torch.Tensor) -> bool:
    """Biases, norms and the mask token, all vectors, have no decay (layers are stacked: [L, D] is a vector too)."""
    stacked = ".decoder.layers." in name
    return weight.dim() - stacked > 1


def gradient_norm(gradients: dict[str, torch.Tensor]) -> float:
    """Euclidean norm over all gradients."""
    return math.sqrt(sum(g.square().sum().item() for g in gradients.values()))


def step(
    weights: dict[str, torch.Tensor],
    gradients: dict[str, torch.Tensor],
    moments: Moments,
    settings: AdamW,
    rate: float,
) -> None:
    """Clip and take one step in place."""
    norm = gradient_norm(gradients)
    scale = min(1.0, settings.clip / norm)
    moments.steps += 1
    for name, gradient in gradients.items():
        gradient = gradient * scale
        weight = weights[name]
        zero = torch.zeros_like(weight)
        first = settings.beta1 * moments.first.get(name, zero) + (1 - settings.beta1) * gradient
        second = settings.beta2 * moments.second.get(name, zero) + (1 - settings.beta2) * gradient**2
        moments.first[name], moments.second[name] = first, second
        first = first / (1 - settings.beta1**moments.steps)
        second = second / (1 - settings.beta2**moments.steps)
        decay = settings.weight_decay if is_decayed(name, weight) else 0.0
        weights[name] = weight - rate * (decay * weight + first / (second.sqrt() + settings.epsilon))
