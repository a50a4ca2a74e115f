"""Tensors on their way from the host to a device, which nobody waits for."""

import torch
from torch import Tensor


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """The same tensor on `device`, its copy begun and not waited for; itself if it is there already.

    A GPU is reached through page-locked memory: before it copies more than 64 KiB of ordinary memory the driver may
    wait for all that the stream has to do. Page-locked memory is reused only when the copy is over.
    """
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
