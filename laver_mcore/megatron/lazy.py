"""Parameters of which an element without gradient in a step stays where it is, its moments included.

Adam moves an element along its first moment long after its last gradient. Rows of a table that few steps choose
should not: what got a gradient of exactly zero is put back after the update, element by element, so that it does not
matter which rank keeps which part of a row.
"""

from collections.abc import Sequence
from typing import Any

import torch

_MOMENTS = ("exp_avg", "exp_avg_sq")


def keep_still(optimizer: torch.optim.Optimizer, parameters: Sequence[torch.nn.Parameter]) -> None:
    """Make an Adam (torch's, apex's or Transformer Engine's) leave elements of these alone that have no gradient."""
    if not parameters:
        return
    kept: list[tuple[torch.nn.Parameter, torch.Tensor, dict[str, torch.Tensor]]] = []

    def remember(*_: Any) -> None:
        kept.clear()
        for parameter in parameters:
            state = optimizer.state.get(parameter, {})
            moments = {name: state[name].clone() for name in _MOMENTS if name in state}
            kept.append((parameter, parameter.detach().clone(), moments))

    @torch.no_grad()
    def put_back(*_: Any) -> None:
        for parameter, before, moments in kept:
            still = gradient(parameter) == 0
            parameter.copy_(torch.where(still, before, parameter))
            for name in _MOMENTS:
                now = optimizer.state[parameter][name]
                now.copy_(torch.where(still, moments.get(name, torch.zeros_like(now)), now))
        kept.clear()

    optimizer.register_step_pre_hook(remember)
    optimizer.register_step_post_hook(put_back)


def gradient(parameter: torch.nn.Parameter) -> torch.Tensor:
    """What its update is made of."""
    decoupled = getattr(
        parameter, "decoupled_grad", None
    )  # Transformer Engine's, where that is of another dtype
    found = parameter.grad if decoupled is None else decoupled
    assert found is not None
    return found
