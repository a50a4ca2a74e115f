"""Test helpers are importable by their folder's name: `from sample_run import ...`, `from integration.harness ...`."""

import os
import sys
from pathlib import Path

# What is tested stands in this checkout, whatever is installed; so for the processes that tests start.
_ROOT = Path(__file__).resolve().parents[1]
_PATH = [str(_ROOT), str(_ROOT / "kernels")]
sys.path[:0] = [str(Path(__file__).parent), *_PATH]
os.environ["PYTHONPATH"] = os.pathsep.join([*_PATH, *filter(None, [os.environ.get("PYTHONPATH")])])

# On a machine with GPUs the tests of process groups are about gloo all the same; those of GPUs are asked for by name
# (`make gpu-test`). Set before torch is imported, for this process and those that it starts.
if not any("tests/gpu" in argument for argument in sys.argv):
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

# Hooks: what is slow, and a last line for every group of tests that did not run.
from not_run import (  # noqa: E402, F401
    pytest_collection_modifyitems,
    pytest_collectreport,
    pytest_sessionfinish,
    pytest_terminal_summary,
    pytest_testnodedown,
)
