"""From visual features to the decoder's width."""

from typing import Any

import torch


class Connector(torch.nn.Module):
    """Linear, GELU, Linear: visual features [N, E] -> [N, D] (LLaVA-1.5's connector, which LaVer keeps)."""

    def __init__(
        self, input_size: int, hidden_size: int, output_size: int, *, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__()
        kind: dict[str, Any] = dict(dtype=dtype, device=device)
        self.layers = torch.nn.Sequential(
            torch.nn.Linear(input_size, hidden_size, **kind),
            torch.nn.GELU(),
            torch.nn.Linear(hidden_size, output_size, **kind),
        )

    def forward(self, features_NE: torch.Tensor) -> torch.Tensor:
        return self.layers(features_NE)
