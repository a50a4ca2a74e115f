"""Every command that the documentation shows: the program and the files it names exist and know the flags."""

import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from laver_mcore.cli.main import COMMANDS
from laver_mcore.config.objectives import known_objectives

REPOSITORY = Path(__file__).resolve().parents[3]
PAGES = sorted(
    path
    for pattern in ("*.md", "docs/*.md", "kernels/README.md", "examples/eval/README.md")
    for path in REPOSITORY.glob(pattern)
    if path.name != "CHANGELOG.md"  # names what was
)
BLOCK = re.compile(r"^```(?:sh|bash|console)?\n(.*?)^```", re.M | re.S)
INLINE = re.compile(
    r"`((?:python |laver |torchrun |make |sbatch |\.venv/bin/)[^`\n]+|(?:tools|kernels)/[\w/]+\.py [^`\n]+)`"
)
FLAG = re.compile(r"^--[a-z][\w-]*")
PROGRAM = re.compile(r"^(pretrain_laver|[\w.-]+/[\w./-]+)\.py$")  # a bare name is another project's
# Prints {program: its flags} of those named on the command line, all in one process.
HELP = """
import contextlib, io, json, re, runpy, sys
found = {}
for words in sys.argv[1:]:
    program, *rest = words.split()
    program = "laver_mcore" if program == "laver" else program
    sys.argv = [program, *rest, "--help"]
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        if program.endswith(".py"):
            sys.path.insert(0, program.rpartition("/")[0] or ".")
            runpy.run_path(program, run_name="__main__")
        else:
            runpy.run_module(program, run_name="__main__", alter_sys=True)
    name = words if program == "laver_mcore" else program
    found.setdefault(name, []).extend(re.findall(r"--[a-z][\\w-]*", out.getvalue()))
json.dump(found, sys.stdout)
"""


def commands(page: Path) -> Iterator[list[str]]:
    """The words of each command on a page, without what follows a comment sign."""
    text = page.read_text(encoding="utf-8")
    lines = [line for block in BLOCK.findall(text) for line in block.replace("\\\n", " ").splitlines()]
    for line in [*lines, *INLINE.findall(BLOCK.sub("", text))]:
        try:
            words = shlex.split(line, comments=True)
        except ValueError:  # prose with an apostrophe, in a block without a language
            continue
        if words and re.match(r"^(python|laver|torchrun|make|sbatch|\.venv/|tools/|kernels/)", words[0]):
            yield words


def programs(words: list[str]) -> Iterator[tuple[str, list[str]]]:
    """(file or module of this repository, the words behind it)."""
    for index, word in enumerate(words):
        before = words[index - 1] if index else ""
        if PROGRAM.match(word) and not before.startswith("--") and "tests/" not in word:
            yield word, words[index + 1 :]
            return
        if (index == 0 and word.rpartition("/")[2] == "laver") or (before == "-m" and word == "laver_mcore"):
            yield f"laver {words[index + 1]}", words[index + 2 :]
            return
        if before == "-m" and word.startswith("laver_"):
            yield word, words[index + 1 :]
            return


SHOWN = [(page, words) for page in PAGES for words in commands(page)]


@pytest.fixture(scope="module")
def flags() -> dict[str, list[str]]:
    wanted = sorted({program for _, words in SHOWN for program, _ in programs(words)})
    commands_of_ours = [f"laver {name}" for name in COMMANDS]
    known = [name for name in wanted if (REPOSITORY / name).is_file() or not name.endswith(".py")]
    known = [name for name in known if not name.startswith("laver ") or name in commands_of_ours]
    known += ["laver train"]
    known += [
        f"pretrain_laver.py --objective {name}" for name in known_objectives()
    ]  # help is of the chosen one
    command = [sys.executable, "-W", "ignore", "-c", HELP, *known]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=300, check=True)
    found = json.loads(done.stdout)
    recipe = found["pretrain_laver.py"]  # which tools that read a recipe hand on
    reads_a_recipe = {"laver plan", "laver train", "laver inspect-data", "laver prepare-targets"}
    return {
        name: own + recipe if "--config" in own or name in reads_a_recipe else own
        for name, own in found.items()
    }


def test_there_are_commands_to_check():
    assert len(SHOWN) > 80
    assert sum(1 for _, words in SHOWN for _ in programs(words)) > 50


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_programs_know_their_flags(page, flags):
    for words in (words for shown, words in SHOWN if shown == page):
        for program, rest in programs(words):
            assert program in flags, f"{program} of `{' '.join(words)}` does not exist"
            for word in rest:
                flag = FLAG.match(word.replace("_", "-"))
                assert flag is None or flag[0] in flags[program], (
                    f"{program} has no {word}: {' '.join(words)}"
                )


def test_targets_of_make_exist():
    targets = set(re.findall(r"^([a-z-]+):", (REPOSITORY / "Makefile").read_text(encoding="utf-8"), re.M))
    for page, words in SHOWN:
        if words[0] == "make":
            named = [word for word in words[1:] if re.fullmatch(r"[a-z-]+", word)]
            assert set(named[:1]) <= targets, f"{page.name}: {' '.join(words)}"


def test_files_of_the_repository_exist():
    for page, words in SHOWN:
        for word in words:
            if word.startswith(("examples/", "tests/", "requirements/")) and "::" not in word:
                assert (REPOSITORY / word).exists(), f"{page.name}: {word}"


def test_modules_exist():
    for page, words in SHOWN:
        for program, _ in programs(words):
            if not program.endswith(".py") and not program.startswith("laver "):
                assert importlib.util.find_spec(program), f"{page.name}: {program}"


def test_pictures_are_those_that_the_engine_draws(tmp_path):
    """The committed drawings of mask and positions, against freshly drawn ones: the same cells in the same colours."""
    command = [sys.executable, "docs/pictures/draw.py", str(tmp_path)]
    paths = {"PYTHONPATH": os.pathsep.join((str(REPOSITORY), str(REPOSITORY / "kernels")))}
    subprocess.run(command, cwd=REPOSITORY, check=True, timeout=120, env=os.environ | paths)
    for name in ("mask.svg", "positions.svg", "schedules.svg"):
        drawn, kept = ((folder / name).read_text() for folder in (tmp_path, REPOSITORY / "docs/pictures"))
        assert drawn == kept, f"{name} is out of date: python docs/pictures/draw.py"
