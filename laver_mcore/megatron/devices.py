"""Whether a rank gets the GPU that it should have: asked before anything runs on a CPU by mistake."""

import logging
import os
from dataclasses import dataclass
from pathlib import Path

import torch

from laver_mcore.config.errors import ConfigError

logger = logging.getLogger(__name__)

DRIVER = Path("/proc/driver/nvidia/version")
"""There where NVIDIA's driver is loaded."""


@dataclass(frozen=True, kw_only=True)
class DeviceFacts:
    """What is known of a machine's GPUs."""

    driver: str | None
    """First line of the driver's version; None where none is loaded."""
    cuda: str | None
    """CUDA version that torch was built for; None for a build for CPUs."""
    count: int
    """GPUs that torch can use."""
    hidden: bool
    """CUDA_VISIBLE_DEVICES names none."""

    @classmethod
    def found(cls) -> "DeviceFacts":
        """Of this machine."""
        lines = DRIVER.read_text(encoding="utf-8").splitlines() if DRIVER.is_file() else []
        return cls(
            driver=lines[0] if lines else None,
            cuda=torch.version.cuda,
            count=torch.cuda.device_count() if torch.cuda.is_available() else 0,
            hidden=os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1"),
        )


def check_devices(local_rank: int, facts: DeviceFacts) -> None:
    """`ConfigError`: more ranks than GPUs; a driver that torch cannot use, unless its GPUs are hidden."""
    if facts.count:
        if local_rank >= facts.count:
            raise ConfigError(
                f"LOCAL_RANK={local_rank}, but there are {facts.count} GPU(s); start as many ranks a node as it has "
                "(torchrun --nproc-per-node)"
            )
        return
    if facts.driver is None or facts.hidden:
        return
    if facts.cuda is None:
        logger.warning(
            "this machine has an NVIDIA driver, and torch is a build for CPUs: training on the CPU"
        )
        return
    raise ConfigError(
        f"torch was built for CUDA {facts.cuda} and cannot use this machine's driver ({facts.driver}), which may be "
        "too old; install another of them, or set CUDA_VISIBLE_DEVICES= to train on the CPU"
    )
