"""The package as others meet it: built, installed, typed; the README's example runs as it is written."""

import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import laver_kernels

KERNELS = Path(__file__).resolve().parents[2] / "kernels"


def test_the_wheel_is_typed_and_runs_by_itself(tmp_path):
    source = tmp_path / "source"
    shutil.copytree(KERNELS, source, ignore=shutil.ignore_patterns("__pycache__", "build", "*.egg-info"))
    build = "import setuptools.build_meta as b, sys; print(b.build_wheel(sys.argv[1]))"
    done = subprocess.run(
        [sys.executable, "-c", build, str(tmp_path)], cwd=source, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("laver_kernels-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "installed")
    names = {p.relative_to(tmp_path / "installed") for p in (tmp_path / "installed").rglob("*")}
    modules = {p.relative_to(KERNELS) for p in (KERNELS / "laver_kernels").rglob("*.py")}
    assert modules | {Path("laver_kernels/py.typed")} <= names
    assert {p.parts[0] for p in names} == {
        "laver_kernels",
        f"{'-'.join(wheel.name.split('-')[:2])}.dist-info",
    }
    call = f"import sys; sys.path.insert(0, {str(tmp_path / 'installed')!r}); import laver_kernels as k; "
    call += "print(k.__file__, 'triton' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", call], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.split() == [str(tmp_path / "installed/laver_kernels/__init__.py"), "False"], (
        done.stderr
    )


def test_the_readme_example_runs_as_written():
    (example,) = re.findall(r"```python\n(.*?)```", (KERNELS / "README.md").read_text(), re.DOTALL)
    names: dict = {}
    exec(example, names)
    assert names["q_THD"].grad.isfinite().all()
    assert not names["out_THD"][96:].any() and names["out_THD"][:96].any(-1).all()


def test_every_public_name_has_its_line_on_the_api_page():
    page = (KERNELS / "API.md").read_text()
    headings = set(re.findall(r"^### `([A-Za-z_]+)", page, re.MULTILINE))
    assert headings == set(laver_kernels.__all__)
