"""The ahead-of-time gate can fail: doctored configurations fall out, each for its own reason."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

DOCTORED = """
import dataclasses, sys
sys.path[:0] = sys.argv[1:]
import aot
from laver_kernels import aot_cases, configs

good = aot_cases.attention_case("sm_80", "forward", 128)
tile = configs.Tile(rows=128, columns=128, num_warps=8, num_stages=4)
large = aot_cases.attention_case("sm_80", "forward", 128, tile)
tile = configs.Tile(rows=128, columns=128, num_warps=4, num_stages=1)
spilling = aot_cases.attention_case("sm_80", "dq", 128, tile)
unaligned = dataclasses.replace(good, divisible=frozenset())
ema = next(case for case in aot_cases.elementwise_cases("sm_90") if case.name == "ema")
sys.exit(aot.run([good, large, spilling, unaligned, dataclasses.replace(ema, is_matmul=True)]))
"""
FAILURES = (
    "shared memory",
    "spill instructions in a matrix loop",
    "no asynchronous copy",
    "no HGMMA on sm_90",
)


def test_doctored_configurations_fall_out(request):
    kernels = str(request.config.rootpath / "kernels")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", DOCTORED, kernels],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    table = done.stdout.splitlines()
    assert done.returncode == 4, done.stdout + done.stderr
    assert table[-1] == "5 configurations, 4 failed"
    assert "FAILS" not in table[3]  # the line after the configuration that is used
    for words in FAILURES:
        assert any("FAILS" in line and words in line for line in table), words
