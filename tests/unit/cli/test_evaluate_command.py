"""`laver eval` around lmms-eval: what is run, how its results read, and what is refused before it starts."""

import itertools
import json
import sys

import pytest

from laver_mcore.cli import evaluate

RESULTS = {
    "results": {
        "mmstar": {
            "alias": "mmstar",
            "average,none": 0.25,
            "average_stderr,none": 0.01,
            "average_stderr_clt,none": 0.1,
            "coarse,none": 0.5,
        },
        "ocrbench": {
            "alias": " - ocrbench",
            "ocrbench_accuracy,none": 0.125,
            "ocrbench_accuracy_stderr,none": "N/A",
        },
    }
}


@pytest.fixture
def model(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text(json.dumps({"auto_map": {}}))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    return tmp_path


def test_results_become_a_table():
    assert evaluate.table(evaluate.scores(RESULTS)).splitlines() == [
        "task      metric             value",
        "mmstar    average            0.2500 ± 0.0100",
        "mmstar    coarse             0.5000",
        "ocrbench  ocrbench_accuracy  0.1250",
    ]


def test_flags_arrive(model):
    flags = "--trust-remote-code --tasks a,b --batch-size 3 --limit 7 --device cpu --include-path tasks --output out"
    words = evaluate.command(evaluate.parse(["--model", str(model), *flags.split()]))
    assert words[:3] == [sys.executable, "-m", "lmms_eval"]
    given = dict(itertools.pairwise(words))
    assert given["--model_args"] == f"pretrained={model},device=cpu,trust_remote_code=True"
    assert (given["--tasks"], given["--batch_size"], given["--include_path"]) == ("a,b", "3", "tasks")
    assert "--log_samples" in words and words[words.index("--limit") + 1] == "7"


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--tasks a", "brings Python code of its own; read it and give --trust-remote-code"),
        ("--tasks a --limit 0", "--limit 0 is not at least 1"),
        ("--trust-remote-code", "the following arguments are required: --tasks"),
        ("--tasks a --model nowhere", "nowhere has no config.json"),
    ],
)
def test_what_cannot_be_evaluated_is_one_line(model, flags, said, capsys):
    with pytest.raises(SystemExit) as left:
        evaluate.parse(["--model", str(model), *flags.split()])
    assert left.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line


def test_a_failure_of_the_framework_is_one_line(model, tmp_path, monkeypatch, capsys):
    code = "import sys; print('deep trouble'); sys.exit(3)"
    monkeypatch.setattr(evaluate, "command", lambda args: [sys.executable, "-c", code])
    argv = ["--model", str(model), "--tasks", "a", "--trust-remote-code", "--output", str(tmp_path / "out")]
    assert evaluate.main(argv) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert f"lmms-eval ended with status 3: deep trouble ({tmp_path}/out/lmms_eval.log)" in line
