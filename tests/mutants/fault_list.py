"""The planted faults: reading `faults/<area>.yaml`, and checking that the list still fits the code."""

import ast
import shlex
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml


class FaultListError(ValueError):
    """A line of the list that cannot be planted."""


@dataclass(frozen=True, kw_only=True)
class Fault:
    """One wrong line of code and the tests that must notice it."""

    area: str
    what: str
    file: str
    """Relative to the repository."""
    old: str
    """Text that stands exactly once in the file ..."""
    new: str
    """... and what is planted in its place."""
    tests: str
    """Arguments of pytest."""
    line: int
    """In the list."""

    @property
    def name(self) -> str:
        return f"{self.area}: {self.what}"

    @property
    def place(self) -> str:
        return f"{self.area}.yaml:{self.line}"

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def read_faults(folder: Path) -> list[Fault]:
    """Every fault of `folder/*.yaml`; every file is a list of [what, file, old text, new text, tests]."""
    faults = [fault for path in sorted(folder.glob("*.yaml")) for fault in _read_area(path)]
    twice = [name for name, count in Counter(fault.name for fault in faults).items() if count > 1]
    if twice:
        raise FaultListError("named twice: " + "; ".join(twice))
    return faults


def _read_area(path: Path) -> Iterator[Fault]:
    try:
        # Nodes instead of values: they know their line, and `0.0` stays the text it is.
        root = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        raise FaultListError(f"{path.name}: {error}") from error
    if root is not None and not isinstance(root, yaml.SequenceNode):
        raise FaultListError(f"{path.name}: not a list")
    for node in root.value if root is not None else ():
        line = node.start_mark.line + 1
        fields = node.value if isinstance(node, yaml.SequenceNode) else []
        if len(fields) != 5 or not all(isinstance(field, yaml.ScalarNode) for field in fields):
            raise FaultListError(f"{path.name}:{line}: wanted [what, file, old text, new text, tests]")
        what, file, old, new, tests = (field.value for field in fields)
        yield Fault(area=path.stem, what=what, file=file, old=old, new=new, tests=tests, line=line)


def check_faults(faults: Sequence[Fault], tree: Path) -> list[str]:
    """One line for every fault that does not fit the code in `tree`."""
    return [f"{fault.place}: {problem}" for fault in faults if (problem := _problem(fault, tree))]


def _problem(fault: Fault, tree: Path) -> str | None:
    path = tree / fault.file
    if not path.is_file():
        return f"no file {fault.file}"
    paths = [word.split("::")[0] for word in shlex.split(fault.tests) if word.startswith("tests/")]
    missing = [name for name in paths if not (tree / name).exists()]
    if missing or not paths:
        return f"no tests {', '.join(missing)}" if missing else f"{fault.tests!r} names no file of tests"
    text = path.read_text(encoding="utf-8")
    if (count := text.count(fault.old)) != 1:
        return f"{fault.old!r} stands {count} times in {fault.file}, wanted once"
    if path.suffix != ".py":
        return None if fault.new != fault.old else "changes nothing"
    try:
        changed = ast.parse(text.replace(fault.old, fault.new))
    except SyntaxError as error:
        return f"{fault.file} with {fault.new!r} is no Python: {error}"
    return "changes nothing" if ast.dump(changed) == ast.dump(ast.parse(text)) else None


def short_list(faults: Sequence[Fault], size: int) -> list[Fault]:
    """About `size` faults, one after another from every area, those with cheap tests first."""
    areas: dict[str, list[Fault]] = {}
    for fault in sorted(faults, key=lambda fault: (fault.area, _is_dear(fault), fault.line)):
        areas.setdefault(fault.area, []).append(fault)
    rounds = max((len(found) for found in areas.values()), default=0)
    in_turn = [found[i] for i in range(rounds) for found in areas.values() if i < len(found)]
    # Every area has at least one, whatever it costs; beyond that only cheap ones.
    return in_turn[: len(areas)] + [f for f in in_turn[len(areas) :] if not _is_dear(f)][: size - len(areas)]


def _is_dear(fault: Fault) -> bool:
    return "tests/integration" in fault.tests
