"""What torchrun says to a process, checked before anything waits for it: another job may have left it behind."""

import os
from collections.abc import Mapping

from laver_mcore.config.errors import ConfigError


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
