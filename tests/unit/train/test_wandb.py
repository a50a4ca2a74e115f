"""What Weights & Biases is told, by a stand-in of its `init`: nothing outside --save, one run through all resumes."""

import sys
from types import SimpleNamespace

import pytest

from laver_mcore.config.load import parse
from laver_mcore.train.metrics import Metrics

FLAGS = "--model tiny --vision none --objective lm --data-path none --tokenizer-model none --no-tensorboard"


@pytest.fixture
def told(monkeypatch):
    calls = []
    run = SimpleNamespace(log=lambda *_, **__: None, finish=lambda: None)
    monkeypatch.setitem(
        sys.modules, "wandb", SimpleNamespace(init=lambda **settings: calls.append(settings) or run)
    )
    return calls


def start(told, save, iteration=0, flags=""):
    argv = [
        *FLAGS.split(),
        "--wandb-project",
        "mine",
        *(["--save", str(save)] if save else []),
        *flags.split(),
    ]
    Metrics(parse(argv)[0], iteration).close()
    return told[-1]


def test_everything_lies_under_save_with_the_whole_recipe(told, tmp_path):
    settings = start(told, tmp_path / "run", flags="--lr 0.5 --wandb-exp-name first")
    assert settings["dir"] == str(tmp_path / "run")
    assert (settings["project"], settings["name"]) == ("mine", "first")
    assert settings["config"]["optimizer"]["lr"] == 0.5
    assert settings["config"]["objective"] == {"name": "lm"}


def test_a_resumed_run_is_the_same_one_and_a_new_one_another(told, tmp_path):
    first = start(told, tmp_path)
    again = start(told, tmp_path, iteration=5)
    assert again["id"] == first["id"] and again["resume"] == "allow"
    assert start(told, tmp_path)["id"] != first["id"]


def test_without_save_it_keeps_to_its_own_ways(told):
    assert "dir" not in start(told, None) and "id" not in told[-1]
