"""`make mutants` on a toy project: which faults count as caught, and that the list fits the code."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from mutants.fault_list import FaultListError, check_faults, read_faults, short_list

REPOSITORY = Path(__file__).resolve().parents[3]
MUTANTS = REPOSITORY / "tests" / "mutants"

# All that the list has to cover.
AREAS = (
    "data images prompt packing order serve model objectives step optimizer teacher checkpoint conversion export"
    " kernels accounting planner tools"
)

PACKAGE = """
def add(a, b):
    return a + b


def scale(a):
    return 4 * a
"""

TESTS = """
import subprocess
import sys

import pytest
import toy


def test_add():
    assert toy.add(1, 2) == 3


def test_scale_of_nothing():
    assert toy.scale(0) == 0


def test_in_a_process_of_its_own():
    assert subprocess.check_output([sys.executable, "-c", "import toy; print(toy.scale(1))"]) == b"4\\n"


@pytest.mark.skip(reason="never")
def test_skipped():
    assert False


def test_wrong_from_the_start():
    assert toy.add(1, 2) == 4


def test_endless():
    while True:
        pass
"""

# What is planted -> (old, new, tests, verdict, what is said of a broken one).
TOYS = {
    "wrong sign": ("a + b", "a - b", "-k add", "caught", ""),
    "digit of the same size": ("4 *", "5 *", "-k process", "caught", ""),
    "its test looks at zero alone": ("4 *", "5 *", "-k nothing", "survived", ""),
    "another test looks": ("4 *", "5 *", "-k add", "survived", ""),
    "no import": ("def add", "1 / 0\ndef add", "-k add", "broken", "cannot be collected"),
    "test skipped": ("a + b", "a - b", "-k skipped", "broken", "skipped"),
    "test fails anyway": ("a + b", "a - b", "-k start", "broken", "without the fault"),
    "no such test": ("a + b", "a - b", "-k nonsense", "broken", "are none"),
}


@pytest.fixture
def toy(tmp_path):
    """A project with one package, and a folder for lists of faults."""
    for name, text in (("tree/toy/__init__.py", PACKAGE), ("tree/tests/test_toy.py", TESTS)):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "faults").mkdir()
    return tmp_path


def write_list(folder, faults):
    """JSON is YAML; a fault a line."""
    lines = [f"- {json.dumps(fault)}\n" for fault in faults]
    (folder / "faults" / "area.yaml").write_text("# some faults\n" + "".join(lines))


def mutants(folder, *options):
    command = [sys.executable, str(MUTANTS / "run.py"), "--tree", str(folder / "tree"), "--preload", "pytest"]
    command += [
        "--faults",
        str(folder / "faults"),
        "--output",
        str(folder / "out" / "summary.json"),
        *options,
    ]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_verdicts(toy):
    faults = [
        [what, "toy/__init__.py", old, new, f"tests/test_toy.py {k}"]
        for what, (old, new, k, *_) in TOYS.items()
    ]
    write_list(toy, faults)
    done = mutants(toy)
    assert done.returncode == 1, done.stderr
    summary = json.loads((toy / "out" / "summary.json").read_text())
    found = {fault["name"].removeprefix("area: "): fault["verdict"] for fault in summary["faults"]}
    assert found == {what: row[3] for what, row in TOYS.items()}
    assert (summary["planted"], summary["caught"]) == (8, 2)
    assert summary["survived"] == ["area: another test looks", "area: its test looks at zero alone"]
    assert summary["areas"] == {"area": {"planted": 8, "caught": 2, "survived": 2, "broken": 4}}
    for name, why in summary["broken"].items():
        assert TOYS[name.removeprefix("area: ")][4] in why
    # Logs of those to look into are kept, and the tree is as it was.
    assert {path.name for path in (toy / "out" / "logs").glob("area-*")} == {
        "area-4.log",
        "area-5.log",
        "area-6.log",
    }
    assert (toy / "tree" / "toy" / "__init__.py").read_text() == PACKAGE
    assert "8 planted, 2 caught, 2 survived, 4 broken" in done.stdout.splitlines()[-1]


def test_all_caught(toy):
    write_list(toy, [["a", "toy/__init__.py", "a + b", "a - b", "tests/test_toy.py -k add"]])
    done = mutants(toy, "--only", "area: a")
    assert done.returncode == 0, done.stderr
    assert "1 planted, 1 caught, 0 survived" in done.stdout


def test_tests_without_end_are_stopped(toy):
    """Sent to a job directly, so that nothing else is held to a bound of a second."""
    request = {"arguments": ["tests/test_toy.py", "-k", "endless"], "fault": None}
    request |= {"log": str(toy / "log"), "timeout": 1.0}
    command = [sys.executable, str(MUTANTS / "job.py"), str(toy / "tree"), "pytest"]
    done = subprocess.run(
        command, input=json.dumps(request) + "\n", capture_output=True, text=True, timeout=60
    )
    answer = json.loads(done.stdout)
    assert answer["code"] is None and 1 <= answer["seconds"] < 20


ADD = ("toy/__init__.py", "a + b", "a - b", "tests/test_toy.py")
STALE = {
    "text_gone": (["x", "toy/__init__.py", "a * b", "a - b", "tests/test_toy.py"], "stands 0 times"),
    "text_twice": (["x", "toy/__init__.py", "return", "pass", "tests/test_toy.py"], "stands 2 times"),
    "same_text": (["x", "toy/__init__.py", "a + b", "a + b", "tests/test_toy.py"], "changes nothing"),
    "same_meaning": (["x", "toy/__init__.py", "a + b", "(a + b)", "tests/test_toy.py"], "changes nothing"),
    "no_python": (["x", "toy/__init__.py", "a + b", "a +", "tests/test_toy.py"], "is no Python"),
    "no_file": (["x", "toy/gone.py", "a + b", "a - b", "tests/test_toy.py"], "no file toy/gone.py"),
    "no_tests": (["x", "toy/__init__.py", "a + b", "a - b", "tests/gone.py::x"], "no tests tests/gone.py"),
    "all_tests": (["x", "toy/__init__.py", "a + b", "a - b", "-k add"], "names no file"),
    "four_fields": (["x", *ADD[:3]], "wanted [what, file, old text, new text, tests]"),
}


@pytest.mark.parametrize(("fault", "message"), STALE.values(), ids=STALE)
def test_a_stale_line_is_named(toy, fault, message):
    write_list(toy, [["fits", *ADD], fault])
    try:
        problems = check_faults(read_faults(toy / "faults"), toy / "tree")
    except FaultListError as error:
        problems = [str(error)]
    assert len(problems) == 1
    assert problems[0].startswith("area.yaml:3: ") and message in problems[0]


def test_a_stale_list_plants_nothing(toy):
    write_list(toy, [["fits", *ADD], STALE["text_gone"][0]])
    done = mutants(toy)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("area.yaml:3: 'a * b' stands 0 times")


def test_two_faults_of_one_name_are_refused(toy):
    write_list(toy, [["fits", *ADD], ["fits", *ADD]])
    with pytest.raises(FaultListError, match="named twice: area: fits"):
        read_faults(toy / "faults")


def test_short_list_takes_every_area_and_then_cheap_ones(toy):
    dear = [[f"dear {n}", *ADD[:3], "tests/integration/test_x.py"] for n in range(9)]
    (toy / "faults" / "a.yaml").write_text(json.dumps(dear))
    (toy / "faults" / "b.yaml").write_text(
        json.dumps([dear[0], ["cheap", *ADD], ["cheap too", *ADD], dear[1]])
    )
    found = [fault.name for fault in short_list(read_faults(toy / "faults"), 4)]
    assert found == ["a: dear 0", "b: cheap", "b: cheap too"]


def test_the_list_fits_the_code():
    """Otherwise somebody who moves a line learns of it in the next `make mutants`."""
    faults = read_faults(MUTANTS / "faults")
    assert check_faults(faults, REPOSITORY) == []
    assert len(faults) >= 80
    assert {fault.area for fault in faults} >= set(AREAS.split())
    short = short_list(faults, 20)
    assert {fault.area for fault in short} == {fault.area for fault in faults}
    assert len(short) <= max(20, len(AREAS.split()))


def test_every_fault_is_to_be_noticed_by_tests_that_exist():
    command = [sys.executable, str(MUTANTS / "selection.py")]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr or done.stdout[-2000:]
