"""What reads an objective's predictions out of visual states: a chain of linear layers."""

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import torch

from laver_mcore.config.schema import AddedWeight


class Head(torch.nn.Module):
    """Linear layers of the given widths, an activation between two of them: states [N, D] -> latents [N, K]."""

    def __init__(
        self,
        widths: Sequence[int],
        activation: Callable[[], torch.nn.Module],
        *,
        last_bias: bool = True,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        super().__init__()
        layers: list[torch.nn.Module] = []
        for i, (inner, outer) in enumerate(pairwise(widths)):
            bias = last_bias or i < len(widths) - 2
            layers += [torch.nn.Linear(inner, outer, bias=bias, dtype=dtype, device=device), activation()]
        self.layers = torch.nn.Sequential(*layers[:-1])

    def forward(self, states_ND: torch.Tensor) -> torch.Tensor:
        return self.layers(states_ND)


def head_weights(
    name: str, widths: Sequence[int], *, last_bias: bool = True, std: float | None = None, uses: int = 1
) -> Iterator[AddedWeight]:
    """The parameters of a `Head` called `name`; Kaiming-normal where no `std` is given. Biases start at 0."""
    for i, (inner, outer) in enumerate(pairwise(widths)):
        start = math.sqrt(2.0 / inner) if std is None else std
        yield AddedWeight(
            name=f"{name}.layers.{2 * i}.weight", shape=(outer, inner), place="last", std=start, uses=uses
        )
        if last_bias or i < len(widths) - 2:
            yield AddedWeight(name=f"{name}.layers.{2 * i}.bias", shape=(outer,), place="last")
