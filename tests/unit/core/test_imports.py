"""The import direction of the package, read from its source, as the annotated tree in CONTRIBUTING.md draws it.

config, device -> shapes -> megatron, data -> model -> objectives -> train -> cli
"""

import ast
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[3]
PACKAGE = "laver_mcore"

# Room of the package -> what its modules may import of ours, besides the room itself. A package stands for all its
# modules; a longer name wins over a shorter one.
MAY_IMPORT: dict[str, tuple[str, ...]] = {
    "config": (),
    "device": (),
    "page": (),
    "processes": (),
    "shapes": ("config",),
    "megatron": ("config", "processes"),
    "data.errors": (),
    "data.randomness": (),
    "data.images": ("config.errors", "config.hugging_face", "data.errors", "device"),
    "data.records": ("data.errors", "data.images"),
    "data.sequence": (
        "config.decoders.templates",
        "data.errors",
        "data.randomness",
        "data.records",
        "laver_kernels",
    ),
    "data.order": ("data.errors", "data.images", "data.randomness", "data.records", "data.sequence"),
    "data.serve": ("data.errors", "data.images", "data.order", "data.records", "data.sequence", "device"),
    "data.prepare": ("data.errors", "data.images", "data.randomness", "data.records", "page"),
    "accounting": ("config", "data.order.cost", "shapes"),
    "model": (
        "config",
        "data.order.balance",
        "data.sequence",
        "device",
        "laver_kernels",
        "megatron",
        "shapes",
    ),
    "objectives": (
        "config",
        "data.errors",
        "data.images.target_cache",
        "data.order.balance",
        "data.sequence",
        "device",
        "laver_kernels",
        "megatron.parallel",
        "megatron.weight_shards",
        "model.image_sharing",
        "model.method",
        "model.teacher",
        "model.frozen_encoders",
        "model.vision_language",
    ),
    "convert": ("config", "data.images", "data.sequence", "megatron", "model"),
    "train": (
        "accounting",
        "config",
        "convert",
        "data",
        "device",
        "laver_kernels",
        "megatron",
        "model",
        "objectives",
        "shapes",
    ),
    "generate": ("data.images", "data.order", "data.sequence", "model", "train.pipeline"),
    "validation": (
        "config",
        "data",
        "device",
        "diagnose.measures",
        "generate",
        "laver_kernels",
        "model",
        "objectives.next_token",
        "objectives.similarity",
        "train",
    ),
    "plan": ("accounting", "config"),
    "demo": (),
    "diagnose": (
        "convert.export",
        "convert.reference",
        "data.sequence.batch",
        "generate",
        "model",
        "objectives.objective",
        "page",
    ),
    "evaluation": (),
    "cli": (
        "accounting",
        "config",
        "convert",
        "data",
        "diagnose",
        "generate",
        "laver_kernels",
        "megatron",
        "model",
        "page",
        "processes",
        "shapes",
        "train",
        "validation",
    ),
    "__main__": ("cli.main",),
}
MEGATRON_FREE = ("accounting", "plan", "config", "shapes", "data", "objectives", "demo", "device", "page")
MEGATRON_FREE_MODULES = ("train.schedules", "train.metrics", "cli.console")
BUILD_IMPORTERS = ("train.build", "cli")
"""Modules of the package that may wire objects through `build`; tools and tests may as well."""
IMAGE_SHARES = ("data.order.balance", "image_shares")
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
    assert [name for name in MODULES if part_of(name) is None and name != "data"] == [], (
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


@pytest.mark.parametrize("part", MEGATRON_FREE + MEGATRON_FREE_MODULES)
def test_knows_no_megatron(part):
    wrong = [
        f"{name} imports {module}"
        for name, file in MODULES.items()
        if within(name, (part,))
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
        if imported[0] == "data.order.balance"
    }
    assert taken <= {IMAGE_SHARES}


def test_objectives_know_batches_the_models_output_and_the_teacher_alone():
    taken = {
        imported
        for name, file in MODULES.items()
        if part_of(name) == "objectives"
        for imported in ours(file)
        if within(imported[0], ("data", "model"))
    }
    assert {module for module, _ in taken} <= {
        "model.image_sharing",
        "model.method",
        "model.teacher",
        "model.frozen_encoders",
        "data.errors",
        "data.images.target_cache",
        "model.vision_language",
        "data.order.balance",
        "data.sequence.batch",
        "data.sequence.masking",
    }
    assert {name for module, name in taken if module == "model.vision_language"} == {"VisionLanguageModel"}


def test_build_is_imported_by_entry_points_alone():
    importers = {name for name, file in MODULES.items() if any(m == "train.build" for m, _ in ours(file))}
    assert {name for name in importers if not within(name, BUILD_IMPORTERS)} == set()
    assert "cli.run" in importers


def circles(arrows: dict[str, set[str]]) -> list[list[str]]:
    """One circle through each node that lies on any, by walking every way (Tarjan would be faster, not clearer)."""
    found = []
    for start in arrows:
        way, seen = [[start]], set()
        while way:
            path = way.pop()
            for following in arrows.get(path[-1], set()):
                if following == start:
                    found.append([*path, start])
                    way = []
                    break
                if following not in seen:
                    seen.add(following)
                    way.append([*path, following])
    return found


def test_no_module_imports_itself_by_a_detour():
    arrows = {name: {m for m, _ in ours(file) if m in MODULES} - {name} for name, file in MODULES.items()}
    assert circles(arrows) == []


def test_no_room_imports_itself_by_a_detour():
    arrows: dict[str, set[str]] = {part: set() for part in MAY_IMPORT}
    for name, file in MODULES.items():
        here = part_of(name)
        for module, _ in ours(file):
            there = part_of(module)
            if here is not None and there is not None and there != here:
                arrows[here].add(there)
    assert circles(arrows) == []
    assert sum(map(len, arrows.values())) > 30


@pytest.mark.parametrize(
    ("arrows", "wanted"),
    [
        ({"a": {"b"}, "b": {"c"}, "c": set()}, []),
        ({"a": {"b"}, "b": {"a"}}, [["a", "b", "a"], ["b", "a", "b"]]),
        ({"a": {"b"}, "b": {"c"}, "c": {"b"}}, [["b", "c", "b"], ["c", "b", "c"]]),
    ],
    ids=["none", "two", "behind_another"],
)
def test_circles_are_found(arrows, wanted):
    assert circles(arrows) == wanted


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
        "def f():\n    from laver_mcore.train import checkpoint\n    import laver_kernels.api\n",
        encoding="utf-8",
    )
    assert ours(file) == {("train.checkpoint", ""), ("laver_kernels", "")}
