"""The head that reads reconstructions out of the decoder's last hidden state."""

from typing import Any

import torch


class VisionHead(torch.nn.Module):
    """Linear, GELU, Linear, GELU, Linear without bias: post-norm states [N, D] -> latents [N, K], K = D.

    Source: LaVer (arXiv 2512.06281), released code: inner width 2048, Kaiming-normal weights.
    """

    def __init__(self, width: int, hidden_size: int, *, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        kind: dict[str, Any] = dict(dtype=dtype, device=device)
        self.layers = torch.nn.Sequential(
            torch.nn.Linear(width, hidden_size, **kind),
            torch.nn.GELU(),
            torch.nn.Linear(hidden_size, hidden_size, **kind),
            torch.nn.GELU(),
            torch.nn.Linear(hidden_size, width, bias=False, **kind),
        )

    def forward(self, hidden_ND: torch.Tensor) -> torch.Tensor:
        return self.layers(hidden_ND)
