"""The kernel hub's layout: loaded from its folder under names of its own, twice in one process, nothing installed."""

import subprocess
import sys
import tomllib
from pathlib import Path

KERNELS = Path(__file__).resolve().parents[2] / "kernels"
# As the hub's loader does: by path, under a name that no import knows.
LOAD = """
import importlib.util, sys
from pathlib import Path

def load(name, folder):
    place = Path(folder) / "build" / "torch-universal" / "laver_kernels" / "__init__.py"
    spec = importlib.util.spec_from_file_location(name, place)
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

sys.path = [entry for entry in sys.path if entry not in ("", BLOCKED)]
sys.meta_path = [f for f in sys.meta_path if "laver" not in getattr(f, "__module__", "") + repr(f)]
import torch
assert importlib.util.find_spec("laver_kernels") is None
first, second = load("hub_first", FIRST), load("hub_second", SECOND)
outs = []
for each in (first, second):
    mask = each.Intervals.from_spans([(0, 40)], [(3, 30)])
    q, k = torch.ones(40, 2, 16, requires_grad=True), torch.randn(40, 1, 16, generator=torch.Generator().manual_seed(0))
    out = each.mixed_attention(q, k, k, mask, impl="triton")
    assert torch.autograd.grad(out.sum(), q)[0].isfinite().all()
    outs.append(out.detach())
assert torch.equal(*outs)
import importlib
for name in ("hub_first", "hub_second"):
    for operation in ("gram", "latent_cross_entropy", "linear_cross_entropy", "ema", "mixed_attention"):
        importlib.import_module(f"{name}.{operation}.triton")
assert "laver_kernels" not in sys.modules
print("loaded twice")
"""


def test_the_folder_loads_under_any_name_and_twice(tmp_path):
    sys.path.insert(0, str(KERNELS))
    import hub_layout

    sys.path.remove(str(KERNELS))
    hub_layout.write(tmp_path / "first")
    hub_layout.write(tmp_path / "second")
    # Another version: another digest, and so other operators.
    for module in (tmp_path / "second" / "build").rglob("*.py"):
        module.write_text(module.read_text().replace('"laver_kernels_', '"laver_kernels_other_'))
    names = {"FIRST": str(tmp_path / "first"), "SECOND": str(tmp_path / "second"), "BLOCKED": str(KERNELS)}
    script = "".join(f"{name} = {value!r}\n" for name, value in names.items()) + LOAD
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={"TRITON_INTERPRET": "1", "PATH": "", "HOME": str(tmp_path)},
    )
    assert done.stdout.strip() == "loaded twice", done.stderr
    for layout in hub_layout.LAYOUTS:
        assert (tmp_path / "first" / layout / "__init__.py").is_file()


def test_the_build_file_names_the_package():
    general = tomllib.loads((KERNELS / "build.toml").read_text())["general"]
    assert general["name"] == "laver_kernels"
    assert (KERNELS / general["name"] / "__init__.py").is_file()
