"""What layouts are compared under: GPUs, what a row holds, and which share of a peak is assumed to be reached."""

from dataclasses import dataclass

from laver_mcore.accounting.devices import Gpu
from laver_mcore.accounting.typical import Mix


@dataclass(frozen=True, kw_only=True)
class Rates:
    """What is assumed to be reached of what a GPU and its links have."""

    kernels: float = 1.0
    """Of the rates that are assumed for matrix products and attention."""
    memory: float = 0.8
    """Of the memory's bandwidth."""
    link: float = 0.75
    """Of a link's bandwidth, by a collective."""
    gap: float = 2e-6
    """Seconds between two kernels."""


ASSUMED = Rates()
BEST = Rates(kernels=1.08, memory=0.9, link=0.85, gap=1e-6)
WORST = Rates(kernels=0.88, memory=0.65, link=0.6, gap=4e-6)
"""The ends of a prediction's range."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What layouts are compared under."""

    gpu: Gpu
    num_gpus: int
    mix: Mix
    vocab_size: int
    matmul_efficiency: float
    rates: Rates = ASSUMED

    @property
    def memory_rate(self) -> float:
        """Bytes per second of what is limited by the memory."""
        return self.rates.memory * self.gpu.memory_bandwidth
