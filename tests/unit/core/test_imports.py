"""The import direction of the package, read from its source: data -> model -> objectives -> step -> loop.

`config` and `schedules` stand below everything, `build` above everything but the entry points.
"""

import ast
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[3]
PACKAGE = "laver_mcore"

# Part of the package -> what its modules may import of ours, besides the part itself. A package stands for all
# its modules; a longer name wins over a shorter one.
MAY_IMPORT: dict[str, tuple[str, ...]] = {
    "config": (),
    "schedules": ("config.schema",),
    "cpu": (),
    "parallel": ("config.schema", "cpu"),
    "data": ("laver_kernels",),
    "model": (
        "accounting.weights",
        "config",
        "data.balance",
        "data.batch",
        "data.device_copy",
        "data.layout",
        "laver_kernels",
        "parallel",
    ),
    "exit_signal": (),
    "objectives": ("data.device_copy", "model.laver", "laver_kernels"),
    "optimizer": ("config", "model.weight_shards", "parallel"),
    "engine": ("config", "model", "parallel"),
    "pipeline": ("engine",),
    "accounting": ("config", "schedules"),
    "counts": ("accounting", "data", "model", "objectives", "engine", "pipeline"),
    "step": (
        "accounting.timers",
        "counts",
        "data",
        "model",
        "objectives",
        "engine",
        "optimizer",
        "pipeline",
        "schedules",
    ),
    "metrics": ("config",),
    "checkpoint": ("config", "model", "engine", "optimizer"),
    "profiling": ("config.schema",),
    "loop": (
        "profiling",
        "accounting",
        "counts",
        "data",
        "step",
        "checkpoint",
        "engine",
        "metrics",
        "schedules",
    ),
    "training_cost": ("accounting", "config", "data.cost"),
    "generate": ("config", "data", "model", "engine", "pipeline"),
    "convert": ("config", "data", "model", "parallel", "engine", "checkpoint", "pipeline"),
    "report": ("report_picture",),
    "report_picture": ("report",),
    "demo": (),
    "console": (),
    "build": (
        "config",
        "data",
        "model",
        "parallel",
        "objectives",
        "optimizer",
        "engine",
        "checkpoint",
        "laver_kernels",
        "convert",
        "schedules",
        "training_cost",
    ),
    "run": (
        "build",
        "config",
        "data",
        "model",
        "parallel",
        "engine",
        "checkpoint",
        "loop",
        "metrics",
        "laver_kernels",
        "exit_signal",
    ),
    "plan": ("accounting", "config", "schedules"),
    "dry_run": ("accounting", "build", "config", "data", "model", "parallel", "cpu", "run"),
}
MEGATRON_FREE = (
    "accounting",
    "plan",
    "config",
    "schedules",
    "data",
    "objectives",
    "metrics",
    "console",
    "report",
    "report_picture",
    "demo",
)
BUILD_IMPORTERS = ("build", "run", "dry_run", "convert")
"""Modules of the package that may wire objects through `build`; tools and tests may as well."""
IMAGE_SHARES = ("data.balance", "image_shares")
"""All that the model may know of who does what: how images are shared out."""


def modules() -> dict[str, Path]:
    """Dotted name below the package -> file."""
    root = REPOSITORY / PACKAGE
    found = {}
    for file in sorted(root.rglob("*.py")):
        parts = file.relative_to(root).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


def imports_of(file: Path) -> set[tuple[str, str]]:
    """(module, name) of every import of a file, wherever in it; the name is empty for `import module`."""
    found: set[tuple[str, str]] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {(alias.name, "") for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found |= {(node.module or "", alias.name) for alias in node.names}
    return found


def ours(file: Path) -> set[tuple[str, str]]:
    """(module below the package, name) of the imports of a file that are ours; `laver_kernels` as it is."""
    known, found = modules(), set()
    for module, name in imports_of(file):
        if module == "laver_kernels" or module.startswith("laver_kernels."):
            found.add(("laver_kernels", name))
        elif module == PACKAGE or module.startswith(f"{PACKAGE}."):
            below = module.removeprefix(PACKAGE).lstrip(".")
            whole = f"{below}.{name}".lstrip(".")
            found.add((whole, "") if whole in known else (below, name))
    return found


def within(module: str, parts: tuple[str, ...]) -> bool:
    return any(module == part or module.startswith(f"{part}.") for part in parts)


def part_of(module: str) -> str | None:
    """The row of the table that a module falls under."""
    rows = [part for part in MAY_IMPORT if within(module, (part,))]
    return max(rows, key=len) if rows else None


MODULES = {name: file for name, file in modules().items() if name}


def test_every_module_has_a_row():
    assert [name for name in MODULES if part_of(name) is None] == [], (
        "add it to MAY_IMPORT: what may it know?"
    )


@pytest.mark.parametrize("part", MAY_IMPORT)
def test_imports_only_what_its_row_allows(part):
    files = {name: file for name, file in MODULES.items() if part_of(name) == part}
    assert files, f"{part} is gone: delete its row"
    allowed = (part, *MAY_IMPORT[part])
    wrong = [
        f"{name} imports {module or PACKAGE}"
        for name, file in files.items()
        for module, _ in ours(file)
        if not within(module, allowed)
    ]
    assert wrong == []


@pytest.mark.parametrize("part", MEGATRON_FREE)
def test_knows_no_megatron(part):
    wrong = [
        f"{name} imports {module}"
        for name, file in MODULES.items()
        if part_of(name) == part
        for module, _ in imports_of(file)
        if within(module, ("megatron",))
    ]
    assert wrong == []


def test_model_takes_image_shares_alone_from_the_balance():
    taken = {
        imported
        for name, file in MODULES.items()
        if part_of(name) == "model"
        for imported in ours(file)
        if imported[0] == "data.balance"
    }
    assert taken <= {IMAGE_SHARES}


def test_objectives_know_the_models_output_alone():
    taken = {
        imported
        for name, file in MODULES.items()
        if part_of(name) == "objectives"
        for imported in ours(file)
        if within(imported[0], ("data", "model"))
    }
    assert taken <= {("data.device_copy", "send"), ("model.laver", "LaverOutput")}


def test_build_is_imported_by_entry_points_alone():
    importers = {name for name, file in MODULES.items() if ("build", "") in {(m, "") for m, _ in ours(file)}}
    assert {name for name in importers if not within(name, BUILD_IMPORTERS)} == set()
    assert "run" in importers


def test_kernels_do_not_know_the_engine():
    wrong = [
        f"{file.name} imports {module}"
        for file in (REPOSITORY / "kernels" / "laver_kernels").rglob("*.py")
        for module, _ in imports_of(file)
        if within(module, (PACKAGE, "megatron"))
    ]
    assert wrong == []


def test_the_reader_sees_imports_inside_functions(tmp_path):
    file = tmp_path / "example.py"
    file.write_text(
        "def f():\n    from laver_mcore import checkpoint\n    import laver_kernels.api\n", encoding="utf-8"
    )
    assert ours(file) == {("checkpoint", ""), ("laver_kernels", "")}
