"""The last lines of a test run: what did not run, and the command that runs it."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from not_run import SLOW, lines, slow

TESTS = Path(__file__).resolve().parents[1]

MANY = """
import pytest

@pytest.mark.parametrize("n", range(3))
def test_dali(n):
    pytest.importorskip("nvidia.dali_that_is_not_there")

def test_other():
    pytest.importorskip("no_such_package")

@pytest.mark.skipif(True, reason="Energon is not installed")
def test_energon():
    pass

def test_neither():
    pytest.skip("SigLIP has no CLS token")

def test_runs():
    pass
"""

GPU = """
import pytest

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(True, reason="no CUDA GPU")]

@pytest.mark.parametrize("n", range(4))
def test_on_gpu(n):
    pass
"""

WHOLE_FILE = """
import pytest

pytest.importorskip("no_such_compiler")

def test_unseen():
    pass
"""

RANKS = """
def test_in_ranks():
    assert False
"""

WANTED = {
    "not run: 1 test that needs Energon; `make test-all` installs and runs them",
    "not run: 4 tests that need a CUDA GPU; `make gpu-test`",
    "not run: 3 tests that need nvidia.dali_that_is_not_there; `python -m pip install` it",
    "not run: 1 test that needs no_such_package; `python -m pip install` it",
    "not run: 1 file that needs no_such_compiler; `python -m pip install` it",
    "not run: 1 test: SigLIP has no CLS token",
}


@pytest.fixture
def project(tmp_path):
    """Toy tests under this project's own conftest."""
    for name, text in {
        "test_many.py": MANY,
        "test_gpu.py": GPU,
        "test_whole_file.py": WHOLE_FILE,
        "integration/test_ranks.py": RANKS,
    }.items():
        path = tmp_path / "tests" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    for name in ("conftest.py", "not_run.py"):
        shutil.copy(TESTS / name, tmp_path / "tests")
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu\n    slow\n")
    return tmp_path


def said(project, *options):
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", *options]
    done = subprocess.run(command, cwd=project, capture_output=True, text=True, timeout=120, check=False)
    return done, [line for line in done.stdout.splitlines() if line.startswith("not run")]


@pytest.mark.parametrize(
    "options", [(), ("-n", "2", "--dist", "loadfile")], ids=["one_process", "two_workers"]
)
def test_every_group_has_a_line(project, options):
    done, found = said(project, *options)
    assert "1 failed, 1 passed" in done.stdout, done.stdout + done.stderr
    assert sorted(found) == sorted(WANTED)


def test_the_fast_run_leaves_out_ranks_and_says_so(project):
    done, found = said(project, "-m", "not slow")
    assert done.returncode == 0 and "1 deselected" in done.stdout
    assert set(found) - WANTED == {"not run: tests that start process groups or are slow; `make test`"}


def test_nothing_to_say(project):
    assert said(project, "-k", "test_runs", "tests/test_many.py")[1] == []


def test_packages_of_one_command_share_a_line():
    reasons = [
        f"Skipped: could not import {name!r}: No module" for name in ("pyarrow", "nvidia.dali", "webdataset")
    ]
    reasons += ["Skipped: could not import 'pyarrow': No module", "no Triton"]
    assert lines((reason, False) for reason in reasons) == [
        "not run: 4 tests that need DALI, pyarrow or webdataset; `make test-all` installs and runs them",
        "not run: 1 test that needs Triton; `python -m pip install` it",
    ]


@pytest.mark.parametrize("prefix", SLOW)
def test_slow_ones_exist(prefix):
    file, _, test = prefix.partition("[")[0].partition("::")
    assert f"def {test}" in (TESTS.parent / file).read_text(encoding="utf-8")
    assert slow(prefix)
