"""The `laver` command: every word leads to a command, and what is no word is one line; before torch is imported."""

import subprocess
import sys
import time

import pytest

from laver_mcore.cli import main as cli
from laver_mcore.cli.main import COMMANDS

SLOW = {"inspect-data", "prepare-targets"}
"""Commands that import torch for their help."""


def laver(*argv):
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "laver_mcore", *argv],
        capture_output=True,
        text=True,
        timeout=120,
    )
    imported = [line for line in done.stderr.splitlines() if line.startswith("import time:")]
    said = [line for line in done.stderr.splitlines() if not line.startswith("import time:")]
    return (
        done,
        said,
        any(line.split("|")[-1].strip() == "torch" for line in imported),
        time.monotonic() - start,
    )


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_and_speaks_of_itself(name):
    done, said, torch_imported, _ = laver(name, "--help")
    assert done.returncode == 0 and not said
    assert f"laver {name}" in done.stdout
    assert not torch_imported or name in SLOW


@pytest.mark.parametrize("argv", [(), ("--help",), ("-h",)], ids=str)
def test_all_commands_are_listed(argv, capsys):
    assert cli.main(list(argv)) == (0 if argv else 2)
    listed = capsys.readouterr().out
    assert all(f"  {name} " in listed for name in COMMANDS)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["frain"], "laver: error: no command 'frain'; there are train, "),
        (["prepare", "--outptu", "x"], "laver prepare: error: unknown flag --outptu; did you mean --output?"),
        (["answer"], "laver answer: error: the following arguments are required: --checkpoint, --data"),
        (
            ["chat", "--model", "x", "--max_new_tokens", "0"],
            "laver chat: error: --max-new-tokens 0 is not at least 1",
        ),
        (["chat", "--mod", "x"], "laver chat: error: unknown flag --mod; did you mean --model?"),
        (["train", "nowhere.yaml"], "laver train: error: recipe nowhere.yaml does not exist"),
        (
            ["plan", "nowhere.yaml", "--gpus", "8", "--gpu", "a100-80gb"],
            "laver plan: error: recipe nowhere.yaml does",
        ),
        (
            ["train", "nowhere.txt"],
            "laver train: error: unexpected argument 'nowhere.txt'; values follow a --flag",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_are_one_line_without_torch(argv, said):
    done, lines, torch_imported, seconds = laver(*argv)
    assert done.returncode == 2 and done.stdout == ""
    assert len(lines) == 1 and lines[0].startswith(said)
    assert not torch_imported and seconds < 10  # two seconds on a quiet machine


def test_a_recipe_may_stand_first(tmp_path, capsys):
    (tmp_path / "mine.yaml").write_text(
        "objective: lm\nvision: {vision: none}\ntrain: {train_iters: 7}\n"
        "data: {data_path: [a.json], tokenizer_model: t.model}\n"
    )
    assert cli.run("train", [str(tmp_path / "mine.yaml"), "--print-config", "--hidden-size", "64"]) == 0
    shown = capsys.readouterr().out
    assert "train_iters: 7" in shown and "hidden_size: 64" in shown
