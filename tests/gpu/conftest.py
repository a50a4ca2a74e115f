"""Without a GPU nothing here runs; Triton is then left to the interpreter for tests/kernels."""

import importlib.util
import os
import sys
from pathlib import Path

import pytest
import torch

# This folder is collected first. Triton reads the variable once, on import, and other tests may
# import it before tests/kernels does. On a CPU only our kernels look at it.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

if importlib.util.find_spec("laver_kernels") is None:
    sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "kernels"))


@pytest.fixture
def poison():
    """Fills fresh memory with NaN, so that an element that no kernel writes shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
