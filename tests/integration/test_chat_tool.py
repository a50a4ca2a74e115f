"""tools/chat.py on an exported run: streamed answers, conversations, bad input."""

import io
import shutil

import pytest
import transformers
from PIL import Image
from sample_decoders import random_decoder
from sample_run import write_recipe, write_sample_data
from sample_tokenizers import write_tokenizer_of
from transformers import AutoModelForCausalLM, AutoTokenizer

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


@pytest.fixture(autouse=True)
def quiet():
    """As in a process of its own, where `silence_libraries` comes before transformers."""
    transformers.utils.logging.disable_progress_bar()


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A text model's directory as it is published: nothing of ours in it."""
    directory = tmp_path_factory.mktemp("plain") / "qwen"
    write_tokenizer_of(directory, "qwen2.5")
    random_decoder("qwen2_tied", vocab_size=400).save_pretrained(directory)
    return directory


def test_a_plain_text_model_answers(plain, capsys):
    """Greedy: the tokens of transformers' own generate on the template's text."""
    argv = ["--model", str(plain), "--prompt", "which digits are in row 1?", "--max-new-tokens", "6"]
    assert main(argv) == 0
    tokenizer = AutoTokenizer.from_pretrained(plain)
    model = AutoModelForCausalLM.from_pretrained(plain, dtype="auto")
    turns = [{"role": "user", "content": "which digits are in row 1?"}]
    inputs = tokenizer.apply_chat_template(
        turns, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    new = model.generate(**inputs, max_new_tokens=6, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert capsys.readouterr().out.strip() == tokenizer.decode(new, skip_special_tokens=True).strip()


@pytest.mark.parametrize(
    ("left_out", "more", "message"),
    [
        ("tokenizer.json", [], "has no tokenizer (tokenizer.json, tokenizer.model, vocab.json)"),
        ("chat_template.jinja", [], "chat_template is not set"),
        (None, ["--image", "{d}/a.png"], "is a text model, which takes no --image"),
    ],
    ids=["no tokenizer", "no template", "image"],
)
def test_what_a_text_model_lacks_is_one_line(plain, tmp_path, capsys, left_out, more, message):
    shutil.copytree(plain, tmp_path / "model")
    if left_out:
        (tmp_path / "model" / left_out).unlink()
    Image.new("RGB", (9, 20)).save(tmp_path / "a.png")
    argv = ["--model", str(tmp_path / "model"), "--prompt", "a", *(word.format(d=tmp_path) for word in more)]
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
