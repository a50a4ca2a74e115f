"""What is pinned: each requirement of the package, within its bounds, with hashes, by `make requirements`."""

import re
from importlib.metadata import requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement

FOLDER = Path(__file__).resolve().parents[3] / "requirements"
LISTS = ("base", "data", "dev", "docs")
CHOSEN_APART = {"torch", "triton"}
WITH = {"base": (None, "demo"), "data": ("data",)}
"""List -> extras of the package whose requirements it holds."""


def pins(name: str) -> dict[str, str]:
    text = (FOLDER / f"{name}.txt").read_text(encoding="utf-8")
    return dict(re.findall(r"^([a-z0-9._-]+)==([^\s;\\]+)", text, re.M))


@pytest.mark.parametrize("name", WITH)
def test_pins_lie_within_what_the_package_asks_for(name):
    asked = [Requirement(line) for line in requires("laver-mcore") or ()]
    checked = 0
    for requirement in asked:
        extras = {
            extra
            for extra in WITH[name]
            if requirement.marker is None or requirement.marker.evaluate({"extra": extra or ""})
        }
        of_list = (None in WITH[name]) if requirement.marker is None else bool(extras - {None})
        if of_list and requirement.name not in CHOSEN_APART:
            assert requirement.specifier.contains(pins(name)[requirement.name]), requirement
            checked += 1
    assert checked >= len(WITH[name])


@pytest.mark.parametrize("name", LISTS)
def test_what_is_asked_for_is_pinned_with_hashes(name):
    text = (FOLDER / f"{name}.txt").read_text(encoding="utf-8")
    assert "#    make requirements" in text
    entries = re.split(r"^(?=[a-z0-9])", text, flags=re.M)[1:]
    assert len(entries) >= len(pins(name)) > 3  # one version for each span of Pythons, where they differ
    assert [entry.split()[0] for entry in entries if "--hash=sha256:" not in entry] == []
    wanted = [
        Requirement(line)
        for line in (FOLDER / f"{name}.in").read_text().splitlines()
        if line and line[0] != "#"
    ]
    assert {requirement.name for requirement in wanted} <= set(pins(name))


def test_lists_agree_with_each_other():
    base = pins("base")
    for name in LISTS[1:]:
        assert {k: v for k, v in pins(name).items() if k in base} == {
            k: v for k, v in base.items() if k in pins(name)
        }
        assert not CHOSEN_APART & set(pins(name))
