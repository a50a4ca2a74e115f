"""What differs between Megatron-Core 0.16.1 and 0.19, asked of what is installed and never of its version."""

import functools
import inspect
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing

# They say that what 0.16.1 does is going to be another library's; which of them writes is decided here.
for _name in ("common", "torch"):
    logging.getLogger(f"megatron.core.dist_checkpointing.strategies.{_name}").setLevel(logging.ERROR)


def grads_for_norm(part: Any) -> list[torch.Tensor]:
    """The gradients of an optimizer that count on this rank; newer Megatron-Core calls the method otherwise."""
    method = getattr(part, "get_grads_for_grad_norm", None) or part.get_main_grads_for_grad_norm
    grads: list[torch.Tensor] = method()
    return grads


def own_writer(save: Callable[..., Any]) -> dict[str, str]:
    """What `dist_checkpointing.save` is told so that Megatron-Core writes itself, as it does unasked in 0.16.1.

    Newer ones leave it to nvidia-resiliency-ext, whose writers stay beside training for good.
    """
    return {"async_strategy": "mcore"} if "async_strategy" in inspect.signature(save).parameters else {}


def submodules(part: Any) -> Any:
    """What a part of a layer's spec is made of; newer Megatron-Core writes an MLP as a builder and its arguments."""
    return part.keywords["submodules"] if isinstance(part, functools.partial) else part.submodules


def with_common_file(folder: Path) -> None:
    """Give a written checkpoint the file of all that is no tensor, which newer Megatron-Core keeps among the tensors.

    So every version reads what any has written. One rank does it.
    """
    if not (folder / "common.pt").exists():
        torch.save(dist_checkpointing.load_common_state_dict(str(folder)), folder / "common.pt")
