"""Launch configurations by architecture: looked up, never searched for at start-up.

The figures for sm_80 and sm_90 come from ahead-of-time compilation (`kernels/aot.py`: shared memory, predicted
share of the tensor peak); `kernels/README.md` says which of them were timed. "interpreter" is Triton on the CPU.
"""

import functools
from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True)
class Tile:
    """Rows and columns of one program's tile, depth of its inner step, and Triton's warps and stages."""

    rows: int
    columns: int
    depth: int = 0
    num_warps: int = 4
    num_stages: int = 2


# What one program may use (CUDA C++ Programming Guide, table of compute capabilities).
SHARED_MEMORY_BYTES = {
    "sm_80": 163 * 1024, "sm_89": 99 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "sm_120": 99 * 1024,
}  # fmt: skip
# Whose tiles an architecture without any of its own takes: with the same matrix instructions, and as much memory.
TILES_OF = {"sm_89": "sm_80", "sm_100": "sm_90", "sm_120": "sm_80"}

# Attention, by architecture, kernel and the largest head dimension that the entry serves; 126 stands for the
# ones between 64 and 128, which are padded and need more registers.
# forward, dq: `rows` queries stay, steps of `columns` keys; dkdv: `columns` keys stay, steps of `rows`.
ATTENTION = {
    ("sm_80", "forward", 64): Tile(rows=128, columns=64, num_warps=4, num_stages=3),
    ("sm_80", "forward", 128): Tile(rows=128, columns=32, num_warps=4, num_stages=3),
    ("sm_80", "forward", 126): Tile(rows=128, columns=32, num_warps=4, num_stages=3),
    ("sm_80", "dq", 64): Tile(rows=128, columns=32, num_warps=4, num_stages=3),
    ("sm_80", "dq", 128): Tile(rows=128, columns=16, num_warps=4, num_stages=3),
    ("sm_80", "dq", 126): Tile(rows=128, columns=16, num_warps=4, num_stages=3),
    ("sm_80", "dkdv", 64): Tile(rows=32, columns=128, num_warps=4, num_stages=3),
    ("sm_80", "dkdv", 128): Tile(rows=64, columns=64, num_warps=4, num_stages=2),
    ("sm_80", "dkdv", 126): Tile(rows=64, columns=64, num_warps=4, num_stages=2),
    ("sm_90", "forward", 64): Tile(rows=128, columns=64, num_warps=8, num_stages=3),
    ("sm_90", "forward", 128): Tile(rows=128, columns=128, num_warps=8, num_stages=3),
    ("sm_90", "forward", 126): Tile(rows=128, columns=128, num_warps=8, num_stages=3),
    ("sm_90", "dq", 64): Tile(rows=128, columns=64, num_warps=8, num_stages=3),
    ("sm_90", "dq", 128): Tile(rows=128, columns=64, num_warps=8, num_stages=3),
    ("sm_90", "dq", 126): Tile(rows=128, columns=64, num_warps=8, num_stages=3),
    ("sm_90", "dkdv", 64): Tile(rows=64, columns=64, num_warps=4, num_stages=3),
    ("sm_90", "dkdv", 128): Tile(rows=64, columns=128, num_warps=8, num_stages=3),
    ("sm_90", "dkdv", 126): Tile(rows=64, columns=128, num_warps=8, num_stages=3),
}
# fp32 runs on CUDA cores in full precision (a test and debugging path): small tiles that fit everywhere.
ATTENTION_FP32 = Tile(rows=32, columns=32, num_warps=4, num_stages=1)
# The warp-specialised forward of sm_90, head dimension 128: Triton makes two consumers of four warps each.
SPECIALISED_TILE = Tile(rows=128, columns=128, num_warps=4, num_stages=2)
ATTENTION_INTERPRETER = Tile(rows=32, columns=32)

GRAM = {
    ("sm_80", "forward"): Tile(rows=128, columns=128, depth=32, num_warps=8, num_stages=3),
    ("sm_80", "backward"): Tile(rows=128, columns=128, depth=32, num_warps=8, num_stages=3),
    ("sm_90", "forward"): Tile(rows=128, columns=128, depth=64, num_warps=8, num_stages=3),
    ("sm_90", "backward"): Tile(rows=128, columns=128, depth=64, num_warps=8, num_stages=3),
}
GRAM_FP32 = Tile(rows=32, columns=32, depth=32, num_warps=4, num_stages=2)
GRAM_INTERPRETER = Tile(rows=32, columns=32, depth=32)


@functools.cache
def architecture(device: torch.device) -> str:
    """The table's row for a device of sm_80 or newer: its own architecture or the one whose tiles fit it."""
    if device.type != "cuda":
        return "interpreter"
    return "sm_90" if torch.cuda.get_device_capability(device)[0] in (9, 10) else "sm_80"


def attention_tile(kernel: str, arch: str, head_dim: int, dtype: torch.dtype) -> Tile:
    """The tile of one attention kernel ("forward", "dq" or "dkdv")."""
    if arch == "interpreter":
        return ATTENTION_INTERPRETER
    if dtype == torch.float32:
        return ATTENTION_FP32
    if (arch, kernel, head_dim) in ATTENTION:
        return ATTENTION[arch, kernel, head_dim]
    fits = min(limit for a, k, limit in ATTENTION if (a, k) == (arch, kernel) and limit >= head_dim)
    return ATTENTION[arch, kernel, fits]


def gram_tile(kernel: str, arch: str, dtype: torch.dtype) -> Tile:
    """The tile of one Gram kernel ("forward" or "backward")."""
    if arch == "interpreter":
        return GRAM_INTERPRETER
    if dtype != torch.bfloat16:
        return GRAM_FP32
    return GRAM[arch, kernel]


def padded(size: int) -> int:
    """The next power of two, at least 16: the smallest extent a tensor core takes."""
    return max(16, 1 << (size - 1).bit_length())
