"""Kernel tests run on a GPU where there is one, else through Triton's interpreter on the CPU."""

import importlib.util
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

# Triton reads this when it and the kernels are first imported: it must be set before any test module is.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

KERNELS = str(Path(__file__).resolve().parents[2] / "kernels")
if importlib.util.find_spec("laver_kernels") is None:
    sys.path.insert(0, KERNELS)
sys.path.append(KERNELS)  # the scripts beside the package

HAS_TRITON = importlib.util.find_spec("triton") is not None
if HAS_TRITON and not torch.cuda.is_available():
    import triton.language
    from triton.runtime.interpreter import InterpretedFunction

    if not isinstance(triton.language.zeros, InterpretedFunction):
        pytest.exit("Triton was imported before tests/kernels: run with TRITON_INTERPRET=1 set", returncode=4)


@pytest.fixture(
    params=["reference", pytest.param("triton", marks=pytest.mark.skipif(not HAS_TRITON, reason="no Triton"))]
)
def impl(request) -> str:
    """Both implementations."""
    return request.param


@pytest.fixture(scope="session")
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def poison():
    """Fills fresh memory with NaN, so that an element that no kernel writes shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def bf16_interpreter(monkeypatch):
    """bf16 in the interpreter, repaired (see interpreter_bf16.py); nothing to do on a GPU."""
    if HAS_TRITON and not torch.cuda.is_available():
        from interpreter_bf16 import repair

        repair(monkeypatch)


BENCHMARKS = str(Path(KERNELS) / "benchmarks")
NAMES = ("baselines", "attention_baselines", "workload", "registry", "report", "timing", "run", "tune")


@pytest.fixture
def modules(monkeypatch):
    """The benchmarks' modules, which are scripts beside one another and no package."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    before = {name: sys.modules.pop(name, None) for name in NAMES}
    yield SimpleNamespace(**{name: importlib.import_module(name) for name in NAMES})
    for name, module in before.items():
        sys.modules.pop(name, None)
        if module is not None:
            sys.modules[name] = module
