"""Pages opened in a headless browser."""

import shutil
import subprocess
from pathlib import Path

import pytest

BROWSER = shutil.which("chromium")
NEEDS_BROWSER = pytest.mark.skipif(BROWSER is None, reason="needs chromium")


def opened(page: Path) -> str:
    """The document as the browser has it once its scripts have run."""
    argv = [
        str(BROWSER),
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={page.parent}/profile",
        "--dump-dom",
        f"file://{page}",
    ]
    return subprocess.run(argv, capture_output=True, text=True, timeout=120, check=True).stdout
