"""tools/chat.py on an exported run: streamed answers, conversations, bad input."""

import io

import pytest
from PIL import Image
from sample_run import write_recipe, write_sample_data

from integration.harness import Scenario, run_scenarios
from laver_mcore.cli.chat import main
from laver_mcore.convert.export import export_run

TRUSTED = ("--trust-remote-code", "--model")


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    directory = tmp_path_factory.mktemp("chat")
    write_sample_data(directory, num_samples=8)
    recipe = write_recipe(directory)
    run_scenarios(1, directory, [Scenario(name="run", argv=("--config", str(recipe), "--train-iters", "1"))])
    export_run(directory / "run", directory / "hf")
    return directory


def test_answer_about_two_images(exported, capsys):
    images = [part for name in ("000_0.png", "001_0.png") for part in ("--image", str(exported / name))]
    argv = [
        "--trust-remote-code",
        "--model",
        str(exported / "hf"),
        *images,
        "--prompt",
        "red green",
        "--max-new-tokens",
        "5",
    ]
    assert main(argv) == 0
    first = capsys.readouterr().out
    assert main(argv) == 0
    assert capsys.readouterr().out == first
    assert len(first) > 1


def test_conversation_keeps_its_images(exported, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("red\nblue\n"))
    argv = [
        "--trust-remote-code",
        "--model",
        str(exported / "hf"),
        "--image",
        str(exported / "000_0.png"),
        "--max-new-tokens",
        "3",
    ]
    assert main(argv) == 0
    assert capsys.readouterr().out.count("\n") >= 2


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--model", "{d}/nowhere", "--prompt", "a"], "has no config.json"),
        (["--model", "{d}/hf", "--prompt", "a", "--image", "{d}/none.png"], "no such file"),
        (["--model", "{d}/hf", "--prompt", "a", "--image", "{d}/recipe.yaml"], "not an image"),
        (["--model", "{d}/hf", "--prompt", "a"], "brings Python code of its own; read it"),
    ],
    ids=["no model", "no image", "not an image", "its own code"],
)
def test_bad_input_is_one_line(exported, capsys, argv, message):
    assert main([part.format(d=exported) for part in argv]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_images_of_any_mode(exported, tmp_path, capsys):
    Image.new("RGBA", (9, 20), (0, 0, 0, 0)).save(tmp_path / "a.png")
    argv = [
        "--trust-remote-code",
        "--model",
        str(exported / "hf"),
        "--image",
        str(tmp_path / "a.png"),
        "--prompt",
        "red",
    ]
    assert main([*argv, "--max-new-tokens", "2"]) == 0
