"""Test helpers are importable by their folder's name: `from sample_run import ...`, `from integration.harness ...`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
