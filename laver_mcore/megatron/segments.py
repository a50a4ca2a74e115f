"""A transformer block run in pieces, so that what leaves a layer in its middle can be seen with its gradients.

A forward hook would not do: under full recompute a layer's first forward runs without gradients.
"""

import copy
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch


def run_segments(
    block: Any, hidden: torch.Tensor | None, stops: Sequence[int], **arguments: Any
) -> list[torch.Tensor]:
    """Outputs of a `TransformerBlock` [s, 1, D] after each of the first `stops` layers, rising, and at its end.

    `hidden` is None where the block takes the tensor that it was given (`set_input_tensor`). The final norm is in the
    last output alone.
    """
    found: list[torch.Tensor] = []
    for start, stop in pairwise((0, *stops, len(block.layers))):
        piece = block if not stops else _piece(block, start, stop, last=len(found) == len(stops))
        hidden = piece(hidden_states=hidden, **arguments)
        assert hidden is not None
        found.append(hidden)
    return found


def _piece(block: Any, start: int, stop: int, *, last: bool) -> Any:
    """Layers `start` to `stop` as a block that shares all else; recompute looks for its layers in it later on."""
    piece = copy.copy(block)
    piece._modules = dict(block._modules)
    piece.layers = block.layers[start:stop]
    piece.num_layers_per_pipeline_rank = stop - start
    if not last:
        piece.final_layernorm = None
    if start > 0:
        piece.pre_process = True  # it goes on with what the piece before gave
    return piece
