"""What differs between Megatron-Core 0.16.1 and 0.19, asked of what is installed and never of its version."""

from typing import Any

import torch


def grads_for_norm(part: Any) -> list[torch.Tensor]:
    """The gradients of an optimizer that count on this rank; newer Megatron-Core calls the method otherwise."""
    method = getattr(part, "get_grads_for_grad_norm", None) or part.get_main_grads_for_grad_norm
    grads: list[torch.Tensor] = method()
    return grads
