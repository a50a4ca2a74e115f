"""A page in a real browser: Debian's chromium, headless."""

import shutil
import subprocess
from pathlib import Path

import pytest

_BROWSER = shutil.which("chromium")
_FLAGS = "--headless --no-sandbox --disable-gpu --disable-background-networking --disable-component-update"
needs_browser = pytest.mark.skipif(_BROWSER is None, reason="needs chromium")


def opened(text: str, folder: Path) -> str:
    """The document as the browser has it once its scripts have run."""
    (folder / "page.html").write_text(text, encoding="utf-8")
    command = [str(_BROWSER), *_FLAGS.split(), f"--user-data-dir={folder}/profile", "--dump-dom"]
    command.append(f"file://{folder}/page.html")
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
