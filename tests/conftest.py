"""Test helpers are importable by their folder's name: `from sample_run import ...`, `from integration.harness ...`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

# Hooks: what is slow, and a last line for every group of tests that did not run.
from not_run import (  # noqa: F401
    pytest_collection_modifyitems,
    pytest_collectreport,
    pytest_sessionfinish,
    pytest_terminal_summary,
    pytest_testnodedown,
)
