"""Lets torchvision be imported beside a torch without CUDA, in the environment of `make serve-test`.

The package index has torchvision for CUDA alone: its compiled half does not load, so the two operators that its Python
half describes on import do not exist. They are declared here, without an implementation, when it is imported; what
CLIP and SigLIP need of torchvision is plain Python. Started by a .pth file.
"""

import importlib.abc
import sys
from typing import Any


class Declares(importlib.abc.MetaPathFinder):
    """Declares them when torchvision is looked for, and finds nothing itself."""

    def find_spec(self, name: str, *_: Any) -> None:
        if name != "torchvision":
            return
        sys.meta_path.remove(self)
        import torch

        for operator in ("nms", "qnms"):
            signature = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
            torch.library.define(f"torchvision::{operator}", signature)


sys.meta_path.insert(0, Declares())
