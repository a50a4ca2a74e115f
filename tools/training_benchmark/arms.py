"""The three contenders behind one interface: build, take a step, say what its losses were."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch

from laver_mcore.data.sequence.batch import Batch
from laver_mcore.data.serve.device_copies import send_batch
from laver_mcore.megatron import parallel
from tools.training_benchmark.batches import PaddedBatch, draw_masks, global_batch, packed, padded
from tools.training_benchmark.setting import (
    MOMENTUM,
    Arm,
    Setting,
    engine_config,
    iteration,
    laver_settings,
    vocabulary,
)

SPOILED = 1.1
"""What a spoiled weight is multiplied by."""


@dataclass(frozen=True, kw_only=True)
class Losses:
    """One step's losses, each divided by its global count, and the gradient norm before clipping."""

    lm: float
    mim: float | None
    gram: float | None
    grad_norm: float


class Contender(Protocol):
    """One arm, built on its device."""

    def step(self, number: int, move_teacher: bool = False) -> Any:
        """Train on global batch `number` (they come round again); what it returns is for `losses`."""

    def losses(self, result: Any) -> Losses:
        """The losses of a step; waits for the device."""

    def spoil(self) -> None:
        """Change one weight, so that a loss differs from the other arms'."""


class EngineArm:
    """This engine, with LaVer's losses or the language model's alone."""

    def __init__(self, setting: Setting, laver: bool, device: torch.device) -> None:
        from laver_mcore.train.build import build_engine

        config = engine_config(setting, laver)
        vocab_size = vocabulary(config)
        topology = parallel.build_topology(config.parallel, device)
        self._engine, _ = build_engine(config, topology, vocab_size)
        self._setting, self._laver = setting, laver
        # On the device already, as the loader hands them over.
        self._batches: list[list[Batch]] = [
            [
                send_batch(packed(batch, setting), device)
                for batch in global_batch(setting, vocab_size, number)
            ]
            for number in range(setting.num_batches)
        ]

    def step(self, number: int, move_teacher: bool = False) -> Any:
        from laver_mcore.train.step import train_step

        batches = self._batches[number % len(self._batches)]
        return train_step(self._engine, batches, iteration(number, move_teacher))

    def losses(self, result: Any) -> Losses:
        found = result.named_losses()
        return Losses(
            lm=found["lm_loss"],
            mim=found.get("mim_loss"),
            gram=found.get("gram_loss"),
            grad_norm=float(result.grad_norm),
        )

    def spoil(self) -> None:
        (model,) = self._engine.chunks
        head: Any = model.vision_head.layers[-1] if self._laver else model.decoder.final_layernorm
        head.weight.data.mul_(SPOILED)


class ReleasedArm:
    """The released recipe on transformers, with torch's AdamW."""

    def __init__(self, setting: Setting, device: torch.device) -> None:
        from tools.training_benchmark.released import ReleasedModel

        self._config = engine_config(setting, laver=True)
        vocab_size = vocabulary(self._config)
        self._model = ReleasedModel(
            self._config, vocab_size, recompute=setting.recompute == "full", device=device
        )
        self._optimizer = MasterAdamW(self._model.trainable(), setting.learning_rate, device)
        self._setting, self._device = setting, device
        # Like the engine's, on the device already; masks are drawn in every step, as there.
        self._batches = [
            [
                (batch, padded(batch, setting, 0).to(device))
                for batch in global_batch(setting, vocab_size, number)
            ]
            for number in range(setting.num_batches)
        ]
        self._num_supervised = [
            sum(int((moved.labels_BL >= 0).sum()) for _, moved in batches) for batches in self._batches
        ]

    def step(self, number: int, move_teacher: bool = False) -> Any:
        place = number % len(self._batches)
        masks = [
            draw_masks(batch, self._setting, iteration(number, move_teacher))
            for batch, _ in self._batches[place]
        ]
        moved = [
            replace(each, masked_N=mask.to(self._device))
            for (_, each), mask in zip(self._batches[place], masks, strict=True)
        ]
        counts = [
            self._num_supervised[place],
            sum(int(mask.sum()) for mask in masks),
            sum(len(each.ids_BL) for each in moved),  # one image a sample
        ]
        losses, norm = self._train(moved, counts)
        if move_teacher:
            self._model.move_teacher(MOMENTUM)
        return losses, norm

    def _train(
        self, batches: Sequence[PaddedBatch], counts: Sequence[int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        laver = laver_settings(self._config)
        divisors = torch.tensor(counts, device=self._device).clamp(min=1)
        weights = torch.tensor([1.0, laver.lambda_laver, laver.lambda_gram], device=self._device)
        total = torch.zeros(3, device=self._device)
        self._optimizer.zero_grad()
        for batch in batches:
            losses = self._model.sums(batch, self._config) / divisors
            (losses * weights).sum().backward()
            total += losses.detach()
        return total, self._optimizer.step(self._config.optimizer.clip_grad)

    def losses(self, result: Any) -> Losses:
        (lm, mim, gram), norm = result[0].tolist(), float(result[1])
        return Losses(lm=lm, mim=mim, gram=gram, grad_norm=norm)

    def spoil(self) -> None:
        head: Any = self._model.vision_head[-1]
        head.weight.data.mul_(SPOILED)


class MasterAdamW:
    """torch's AdamW on fp32 masters, copied back into lower-precision parameters after each step."""

    def __init__(
        self, parameters: list[torch.nn.Parameter], learning_rate: float, device: torch.device
    ) -> None:
        self._parameters = parameters
        self._masters = [
            p if p.dtype == torch.float32 else torch.nn.Parameter(p.detach().float()) for p in parameters
        ]
        self._adam = torch.optim.AdamW(
            self._masters, lr=learning_rate, weight_decay=0.0, fused=device.type == "cuda"
        )

    def zero_grad(self) -> None:
        for parameter in self._parameters:
            parameter.grad = None

    @torch.no_grad()
    def step(self, max_norm: float) -> torch.Tensor:
        """Clip and step; returns the gradient norm before clipping."""
        pairs = [(p, m) for p, m in zip(self._parameters, self._masters, strict=True) if p is not m]
        for parameter, master in pairs:
            master.grad = None if parameter.grad is None else parameter.grad.float()
            parameter.grad = None
        norm = torch.nn.utils.clip_grad_norm_(self._masters, max_norm)
        self._adam.step()
        for parameter, master in pairs:
            parameter.copy_(master)
            master.grad = None
        return norm


def build(arm: Arm, setting: Setting, device: torch.device) -> Contender:
    """The contender called `arm`."""
    contender: Contender = (
        EngineArm(setting, arm == "laver", device) if arm != "released" else ReleasedArm(setting, device)
    )
    if setting.perturb == arm:
        contender.spoil()
    return contender
