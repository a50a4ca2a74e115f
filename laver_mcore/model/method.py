"""What a method does inside the model's pass: the seam between the model and the objectives.

    visual tokens -> enter -> dialogue rows, image rows (student's and teacher's), rows that travel on
    decoder layers -> taps -> visual rows that travel on
    last stage -> target: what the teacher's final states become

Rows that travel pass by the layers of later pipeline stages unchanged, gradients included.
"""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch


@dataclass(frozen=True, kw_only=True)
class Entering:
    """Visual tokens on their way into the decoder, [N, D] each."""

    dialogue_ND: torch.Tensor
    """What stands in the dialogue's rows."""
    images_ND: torch.Tensor | None = None
    """What the student sees in the image rows; None where the objective does not reconstruct."""
    taught_ND: torch.Tensor | None = None
    """What the teacher sees in the image rows."""
    travelling: tuple[torch.Tensor, ...] = ()
    """What the last stage receives as it is."""


@dataclass(frozen=True, kw_only=True)
class ModelOutput:
    """What the last stage hands to the objectives; hidden states are after the final norm, whole on every TP rank."""

    dialogue_TD: torch.Tensor
    images_ND: torch.Tensor | None
    """The student's image rows; None where the objective does not reconstruct."""
    target_NK: torch.Tensor | None
    """What the teacher makes of them; None without a teacher, or without images."""
    travelling: tuple[torch.Tensor, ...]
    """Rows [N, D] that travelled: those that entered, then those of the method's taps."""
    output_weight_VD: torch.Tensor


Added = Mapping[str, torch.nn.Module | torch.nn.Parameter]
"""Modules and parameters of an objective's, by the names under which the model holds them."""


class HasWeights(Protocol):
    """Other weights to compute with: an average, a snapshot, or the model's own."""

    def weights(self) -> AbstractContextManager[None]:
        """Context in which the model's modules compute with them, without gradients."""


class Method(Protocol):
    """The part of an objective that takes place inside the pass."""

    @property
    def teacher(self) -> HasWeights | None:
        """Weights that see the image rows as well, just before the student's."""

    @property
    def taps(self) -> tuple[int, ...]:
        """Decoder layers, counted from 1, whose outputs at the dialogue's visual tokens travel to the last stage."""

    def enter(self, visual_ND: torch.Tensor, plan: Any) -> Entering:
        """What becomes of the visual tokens of one micro-batch; on the first stage."""

    def target(self, states_ND: torch.Tensor) -> torch.Tensor:
        """Targets [N, K] from the teacher's final states; on the last stage, with the teacher's weights."""


class Plain:
    """Visual tokens enter as they are, and nothing else happens: the language model's own pass."""

    teacher: HasWeights | None = None
    taps: tuple[int, ...] = ()

    def enter(self, visual_ND: torch.Tensor, plan: Any) -> Entering:
        return Entering(dialogue_ND=visual_ND)

    def target(self, states_ND: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError("there is no teacher")
