"""One training step of LaVer from micro-batches to weights, averages and centre (arXiv 2512.06281)."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch
import torch.nn.functional as F

from oracle import losses, optimizer
from oracle.decoder import Shape, decode
from oracle.sequence import allowed, dialogue, positions, reconstruction

EMBEDDING = "language_model.embedding.word_embeddings.weight"
OUTPUT = "language_model.output_layer.weight"
AVERAGED = ("language_model.", "vision_head.")
Weights = dict[str, torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """A recipe in the method's own symbols."""

    shape: Shape
    adam: optimizer.AdamW
    total: int
    vocab_size: int
    lambda_mim: float = 1.0
    lambda_gram: float = 1.0
    mask_ratio: float = 0.5
    momentum: float = 0.95
    ema_steps: int = 1
    center_momentum: float = 0.9
    tau_student: float = 0.1
    tau_teacher: float = 0.04
    clip_gram: bool = True
    gram_over_micro_batch: bool = False
    mixed: bool = True
    two_dimensional: bool = True
    laver: bool = True
    trainable: tuple[str, ...] = ("*",)

    def ratio(self, iteration: int) -> float:
        """r (1 - cos(pi t / T)) / 2."""
        return self.mask_ratio * (1 - math.cos(math.pi * iteration / self.total)) / 2

    def momentum_at(self, iteration: int) -> float:
        """1 - (1 - m) (1 + cos(pi t / T)) / 2."""
        return 1 - (1 - self.momentum) * (1 + math.cos(math.pi * iteration / self.total)) / 2


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """What the data gives: token and label ids, where documents and visual tokens lie, pixels, and image keys."""

    tokens: torch.Tensor
    labels: torch.Tensor
    document_lengths: Sequence[int]
    visual_rows: Sequence[int]
    image_grids: Sequence[tuple[int, int]]
    image_keys: Sequence[tuple[str, int]]
    pixels: torch.Tensor

    @property
    def image_lengths(self) -> list[int]:
        return [h * w for h, w in self.image_grids]


Draw = Callable[[int, float, str, int, int], Any]
"""(tokens, ratio, sample key, image of the sample, iteration) -> which of an image's tokens are masked."""


@dataclass
class State:
    """Everything that carries over from step to step."""

    weights: Weights
    averages: Weights = field(default_factory=dict)
    center: torch.Tensor | None = None
    moments: optimizer.Moments = field(default_factory=optimizer.Moments)
    distance: float = 0.0
    skipped: int = 0


def start(weights: Weights, settings: Settings) -> State:
    """The state before the first step: the teacher is the student, the centre zero."""
    weights = {name: tensor.double() for name, tensor in weights.items()}
    averages = {n: w.clone() for n, w in weights.items() if n.startswith(AVERAGED)} if settings.laver else {}
    width = weights[EMBEDDING].shape[1]
    return State(weights=weights, averages=averages, center=torch.zeros(width, dtype=torch.float64))


def mlp(x: torch.Tensor, weights: Weights, name: str) -> torch.Tensor:
    """Linear layers with GELU between them; the vision head's last one has no bias."""
    numbers = sorted({int(key.split(".")[2]) for key in weights if key.startswith(f"{name}.layers.")})
    for number in numbers:
        if number:
            x = F.gelu(x)
        x = F.linear(
            x, weights[f"{name}.layers.{number}.weight"], weights.get(f"{name}.layers.{number}.bias")
        )
    return x


def _decode(x_SD, rows, weights: Weights, settings: Settings) -> torch.Tensor:
    where = positions(rows, two_dimensional=settings.two_dimensional)
    return decode(x_SD, weights, where, allowed(rows, mixed=settings.mixed), settings.shape)


def latents(visual_ND, grids, weights: Weights, settings: Settings) -> torch.Tensor:
    """Visual tokens of all images -> vision head's outputs, each image by itself."""
    return mlp(_decode(visual_ND, reconstruction(grids), weights, settings), weights, "vision_head")


def sums(batch: MicroBatch, masked_N, weights: Weights, state: State, settings: Settings) -> dict[str, Any]:
    """Sums and counts of one micro-batch; the teacher's targets beside them."""
    length = sum(batch.document_lengths)
    visual_ND = mlp(batch.pixels.double(), weights, "connector")
    rows = torch.arange(length)
    text = weights[EMBEDDING][batch.tokens[:length]]
    if len(batch.visual_rows):
        text = text.index_copy(0, torch.tensor(list(batch.visual_rows)), visual_ND)
    layout = dialogue(batch.document_lengths, list(batch.visual_rows), batch.image_grids)
    assert len(layout) == len(rows)
    states = _decode(text, layout, weights, settings)
    head = weights[OUTPUT if OUTPUT in weights else EMBEDDING][: settings.vocab_size]
    zero = text.new_zeros(())
    found = {
        "lm_loss": losses.next_token_sum(states, head, batch.labels[:length]),
        "mim_loss": zero,
        "gram_loss": zero,
        "visual_similarity": losses.similarity_sum(
            states[torch.tensor(list(batch.visual_rows), dtype=torch.int64)], batch.image_lengths
        ),
        "targets": None,
    }
    if not settings.laver or not batch.image_grids:
        return found
    masked = torch.from_numpy(masked_N)
    hidden = torch.where(masked[:, None], weights["mask_token"], visual_ND)
    student = latents(hidden, batch.image_grids, weights, settings)
    with torch.no_grad():
        averages = {**weights, **state.averages}
        teacher = latents(visual_ND, batch.image_grids, averages, settings)
    matrices = [sum(batch.image_lengths)] if settings.gram_over_micro_batch else batch.image_lengths
    found["mim_loss"] = losses.mim_sum(
        student, teacher, masked, state.center, settings.tau_student, settings.tau_teacher
    )
    found["gram_loss"] = losses.gram_sum(student, teacher, matrices, clip=settings.clip_gram)
    found["targets"] = teacher
    return found


def counts(batches: Sequence[MicroBatch], masks, settings: Settings) -> dict[str, int]:
    """What each loss is divided by, over all micro-batches."""
    with_images = [batch for batch in batches if batch.image_grids]
    num_images = sum(len(batch.image_grids) for batch in batches)
    return {
        "lm_loss": sum(int((batch.labels != -100).sum()) for batch in batches),
        "mim_loss": sum(int(mask.sum()) for mask in masks),
        "gram_loss": len(with_images) if settings.gram_over_micro_batch else num_images,
        "visual_similarity": sum(n > 1 for batch in batches for n in batch.image_lengths),
    }


def train_step(
    state: State, batches: Sequence[MicroBatch], iteration: int, settings: Settings, draw: Draw
) -> dict[str, float]:
    """Move `state` by one step over the micro-batches of all ranks; returns what a run logs of it."""
    import numpy as np

    ratio, rate = settings.ratio(iteration), settings.adam.rate(iteration, settings.total)
    masks = [
        np.concatenate(
            [np.zeros(0, dtype=bool)]
            + [
                draw(h * w, ratio, key, image, iteration)
                for (h, w), (key, image) in zip(batch.image_grids, batch.image_keys, strict=True)
            ]
        )
        for batch in batches
    ]
    leaves = {
        name: weight.detach().requires_grad_(any(fnmatchcase(name, p) for p in settings.trainable))
        for name, weight in state.weights.items()
    }
    divisors = {name: max(1, count) for name, count in counts(batches, masks, settings).items()}
    measured = dict.fromkeys(divisors, 0.0)
    loss, targets = torch.zeros((), dtype=torch.float64), []
    for batch, mask in zip(batches, masks, strict=True):
        found = sums(batch, mask, leaves, state, settings)
        parts = {name: found[name] / divisor for name, divisor in divisors.items()}
        measured = {name: measured[name] + parts[name].item() for name in parts}
        loss = loss + parts["lm_loss"]
        loss = loss + settings.lambda_mim * parts["mim_loss"] + settings.lambda_gram * parts["gram_loss"]
        if found["targets"] is not None:
            targets.append(found["targets"])
    trained = [name for name, leaf in leaves.items() if leaf.requires_grad]
    grads = torch.autograd.grad(loss, [leaves[name] for name in trained], materialize_grads=True)
    gradients = dict(zip(trained, grads, strict=True))
    norm = optimizer.gradient_norm(gradients)
    if not math.isfinite(norm):
        state.skipped += 1  # and nothing moves: weights, moments, averages, centre
        return {"grad_norm": norm, "learning_rate": rate}
    optimizer.step(state.weights, gradients, state.moments, settings.adam, rate)
    if settings.laver and targets:
        mean = torch.cat(targets).mean(0)
        state.center = settings.center_momentum * state.center + (1 - settings.center_momentum) * mean
    if settings.laver and (iteration + 1) % settings.ema_steps == 0:
        _move_teacher(state, settings.momentum_at(iteration))
    return {
        **measured,
        "loss": loss.item(),
        "grad_norm": norm,
        "learning_rate": rate,
    }


def _move_teacher(state: State, momentum: float) -> None:
    before = state.averages
    state.averages = {n: momentum * a + (1 - momentum) * state.weights[n] for n, a in before.items()}
    state.distance = math.sqrt(sum((state.averages[n] - before[n]).square().sum().item() for n in before))
