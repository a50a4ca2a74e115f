"""Reading a transformers decoder from outside: what each of its layers puts out."""

from collections.abc import Iterable
from typing import Any

import torch


class LayerOutputs(list[torch.Tensor]):
    """Inside `with LayerOutputs(layers) as outputs`, a forward pass appends each layer's output [B, L, D].

    transformers' own `output_hidden_states` gives the last layer's state after the final norm.
    """

    def __init__(self, layers: Iterable[torch.nn.Module]) -> None:
        super().__init__()
        self._layers = list(layers)

    def __enter__(self) -> "LayerOutputs":
        self._hooks = [layer.register_forward_hook(self._keep) for layer in self._layers]
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _keep(self, module: Any, inputs: Any, output: Any) -> None:
        self.append(output[0] if isinstance(output, tuple) else output)
