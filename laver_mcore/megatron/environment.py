"""What torchrun says to a process, checked before anything waits for it, and what CUDA reads from the environment."""

import ctypes
import os
from collections.abc import Mapping, MutableMapping

from laver_mcore.config.errors import ConfigError
from laver_mcore.config.schema import ParallelConfig


def check_environment(environment: Mapping[str, str] = os.environ) -> None:
    """ConfigError naming the variable that fits no process group; a variable that is not set is none."""
    numbers = {
        name: _whole(environment, name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")
    }
    rank, size = numbers["RANK"] or 0, 1 if numbers["WORLD_SIZE"] is None else numbers["WORLD_SIZE"]
    fix = "start with torchrun, or unset it"
    if size < 1:
        raise ConfigError(f"WORLD_SIZE={size} is not at least 1; {fix}")
    if rank >= size:
        raise ConfigError(f"RANK={rank} is not below WORLD_SIZE={size}; {fix}")
    if size > 1 and numbers["MASTER_PORT"] is None:
        raise ConfigError(f"WORLD_SIZE={size} without MASTER_PORT: the other ranks cannot be found; {fix}")
    if (numbers["MASTER_PORT"] or 0) > 65535:
        raise ConfigError(f"MASTER_PORT={numbers['MASTER_PORT']} is no port (0 to 65535); {fix}")


def _whole(environment: Mapping[str, str], name: str) -> int | None:
    value = environment.get(name)
    if value is None:
        return None
    if not (value.isascii() and value.isdigit()):
        raise ConfigError(f"{name}={value!r} is no whole number; start with torchrun, or unset it")
    return int(value)


def prepare_for_gpus(parallel: ParallelConfig, environment: MutableMapping[str, str] = os.environ) -> None:
    """Set what CUDA and torch's allocator read when they are first used; what the user has set stays.

    Where communication of tensor or context parallelism runs beside kernels, a single hardware queue makes it start
    first; since Blackwell priorities do so, and with data parallelism alone more queues overlap more (Megatron-LM's
    `validate_args` asks for the same).
    """
    # Micro-batches differ in length: segments that grow do not fragment.
    environment.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    beside = parallel.tensor_model_parallel_size > 1 or parallel.context_parallel_size > 1
    if beside and "CUDA_DEVICE_MAX_CONNECTIONS" not in environment and (generation() or 10) < 10:
        environment["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"


def generation(library: str = "libnvidia-ml.so.1") -> int | None:
    """Major compute capability of the machine's first GPU, asked without CUDA, which would read its variables now."""
    try:
        nvml = ctypes.CDLL(library)
        device, major, minor = ctypes.c_void_p(), ctypes.c_int(), ctypes.c_int()
        calls = (
            lambda: nvml.nvmlInit_v2(),
            lambda: nvml.nvmlDeviceGetHandleByIndex_v2(0, ctypes.byref(device)),
            lambda: nvml.nvmlDeviceGetCudaComputeCapability(device, ctypes.byref(major), ctypes.byref(minor)),
        )
        return major.value if all(call() == 0 for call in calls) else None
    except (OSError, AttributeError):  # no driver, or not NVIDIA's
        return None
