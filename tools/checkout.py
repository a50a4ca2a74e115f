"""Put the checkout first on the path: its tools run the code that stands beside them, installed or not."""

import sys
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(_ROOT), str(_ROOT / "kernels")]
