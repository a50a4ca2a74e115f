"""The ahead-of-time gate can fail: doctored configurations fall out, each for its own reason."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from long import LONG

pytest.importorskip("triton")

DOCTORED = """
import dataclasses, sys
import aot
from laver_kernels import aot_cases, configs

good = aot_cases.attention_case("sm_80", "forward", 128)
tile = configs.Tile(rows=128, columns=128, num_warps=8, num_stages=4)
large = aot_cases.attention_case("sm_80", "forward", 128, tile)
tile = configs.Tile(rows=128, columns=128, num_warps=4, num_stages=1)
spilling = aot_cases.attention_case("sm_80", "dq", 128, tile)
tile = configs.Tile(rows=128, columns=32, num_warps=8, num_stages=3)
starved = aot_cases.attention_case("sm_80", "forward", 128, tile)
unaligned = dataclasses.replace(good, divisible=frozenset())
ema = next(case for case in aot_cases.elementwise_cases("sm_90") if case.name == "ema")
sys.exit(aot.run([good, large, spilling, starved, unaligned, dataclasses.replace(ema, is_matmul=True)]))
"""
FAILURES = (
    "shared memory",
    "of the tensor peak <",
    "no asynchronous copy",
    "no HGMMA on sm_90",
)


def _uninterpreted(request, *arguments: str) -> subprocess.CompletedProcess:
    """A Python of its own, in which kernels are for the compiler."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(request.config.rootpath / "kernels")
    command = [sys.executable, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)


def test_what_is_compiled_is_what_is_launched(request):
    """Types, constants, multiples of 16, warps and stages of every launch of a 7B model, by the JIT's own rules."""
    done = _uninterpreted(request, str(Path(__file__).with_name("launched_cases.py")))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 differences, not launched: []" in done.stdout


@LONG
def test_doctored_configurations_fall_out(request):
    done = _uninterpreted(request, "-c", DOCTORED)
    table = done.stdout.splitlines()
    assert done.returncode == 5, done.stdout + done.stderr
    assert table[-1] == "6 configurations, 5 failed"
    assert "FAILS" not in table[3]  # the line after the configuration that is used
    for words in FAILURES:
        assert any("FAILS" in line and words in line for line in table), words
