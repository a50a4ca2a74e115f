"""Gram anchoring of a vision model's patches, as DINOv3 trains (arXiv 2508.10104), without an N x N matrix in fp32.

    python kernels/examples/gram_anchoring.py

A student keeps the similarities between its patches near those of an earlier teacher (`clip=False`), or is only held
back from making patches more alike than the teacher's (`clip=True`, LaVer's clipped form, arXiv 2512.06281).
"""

import torch
from torch import nn

from laver_kernels import ema_update_, gram_loss

IMPL = "reference"  # on a CPU; "auto" takes Triton's kernels where there is a GPU
PATCHES = (49, 36, 64)  # images of different sizes, after one another


def small_model() -> nn.Module:
    """A stand-in for a vision transformer: patches of 48 numbers to features of 32."""
    return nn.Sequential(nn.Linear(48, 64), nn.GELU(), nn.Linear(64, 32))


def main(steps: int = 30) -> list[float]:
    """Trains a student towards its teacher's Gram matrices; returns the loss per image and step."""
    torch.manual_seed(0)
    student, teacher = small_model(), small_model()
    optimizer = torch.optim.AdamW(student.parameters(), lr=3e-3)
    pixels = torch.randn(sum(PATCHES), 48)
    losses = []
    for _ in range(steps):
        with torch.no_grad():
            target = teacher(pixels)
        loss = gram_loss(student(pixels), target, PATCHES, clip=False, impl=IMPL) / len(PATCHES)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
        with torch.no_grad():
            for slow, fast in zip(teacher.parameters(), student.parameters(), strict=True):
                ema_update_(slow.data, fast.data, 0.999, impl=IMPL)
    print(f"Gram loss {losses[0]:.4f} -> {losses[-1]:.4f}")
    return losses


if __name__ == "__main__":
    main()
