"""GPUs as their makers describe them: dense bf16 rate, memory, and how fast they reach each other.

Sources: NVIDIA's data sheets of A100 (2021), H100 (2023), H200 (2024) and DGX/HGX B200 (2024), SXM modules; network as
in NVIDIA's DGX systems with one network card per GPU (HDR 200 Gbit/s with A100, NDR 400 Gbit/s since). Bandwidths are
bytes per second in one direction.
"""

from dataclasses import dataclass

GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One GPU and its links."""

    tflops: float
    """Dense bf16 matrix rate, 10^12 FLOPs per second."""
    memory: float
    """Bytes that a program can have."""
    memory_bandwidth: float
    nvlink: float
    """To the GPUs of the same node."""
    network: float
    """To other nodes, per GPU."""
    matmul: float
    """Assumed rate of matrix products alone, as a share of `tflops`."""
    attention: tuple[float, float]
    """Assumed rate of the mixed-attention kernels, forward and backward, as shares of `tflops`."""


# Matrix products: so that published runs of text models lie inside the planner's range (docs/planner.md: llm-foundry's
# MPT-7B, 0.50 and 0.64 MFU on A100, 0.46 on H100); B200 taken to reach Hopper's share.
# Attention: A100 from FlashAttention-2's published 182 TFLOP/s over both directions (causal, 8k); Hopper from this
# project's targets of 400 and 240 TFLOP/s, which no measurement backs yet; B200 taken to reach the same shares.
GPUS: dict[str, Gpu] = {
    "a100-40gb": Gpu(tflops=312, memory=39.4 * GIB, memory_bandwidth=1.555e12, nvlink=300e9, network=25e9,
                     matmul=0.70, attention=(0.60, 0.50)),
    "a100-80gb": Gpu(tflops=312, memory=79.1 * GIB, memory_bandwidth=2.039e12, nvlink=300e9, network=25e9,
                     matmul=0.70, attention=(0.60, 0.50)),
    "h100-80gb": Gpu(tflops=989, memory=79.1 * GIB, memory_bandwidth=3.35e12, nvlink=450e9, network=50e9,
                     matmul=0.55, attention=(0.40, 0.24)),
    "h200": Gpu(tflops=989, memory=139.8 * GIB, memory_bandwidth=4.8e12, nvlink=450e9, network=50e9,
                matmul=0.55, attention=(0.40, 0.24)),
    "b200": Gpu(tflops=2250, memory=178.0 * GIB, memory_bandwidth=8.0e12, nvlink=900e9, network=50e9,
                matmul=0.55, attention=(0.40, 0.24)),
}  # fmt: skip

_SLOWER = ("PCIE", "NVL", "MIG")
"""Variants of the same names with other rates."""


def peak_tflops(device_name: str) -> float | None:
    """Dense bf16 TFLOP/s of a GPU by the name that torch.cuda gives it; None where it is not in the table."""
    name = device_name.upper()
    if any(word in name for word in _SLOWER):
        return None
    for key, gpu in GPUS.items():
        if key.split("-")[0].upper() in name.replace("-", " ").split():
            return gpu.tflops
    return None
