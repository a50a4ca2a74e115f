"""Arguments of the tools that make no sense: one line and exit status 2, before anything is loaded."""

from types import SimpleNamespace

import pytest

from laver_mcore.cli import answer, chat, inspect_data, parity

CHAT = {
    "no tokens": ["--max-new-tokens", "0"],
    "fewer than none": ["--max-new-tokens", "-3"],
    "temperature NaN": ["--temperature", "nan"],
    "temperature below 0": ["--temperature", "-1"],
    "temperature infinite": ["--temperature", "inf"],
}


@pytest.mark.parametrize("flags", CHAT.values(), ids=CHAT)
def test_chat(flags, capsys):
    with pytest.raises(SystemExit) as caught:
        chat.parse(["--model", "nowhere", *flags])
    assert caught.value.code == 2
    assert flags[0] in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("question", "found"),
    [
        ("what?", None),
        ("<|image_pad|> hi", "<|image_pad|>"),
        ("a<|im_end|>b", "<|im_end|>"),
        ("< |im_end|>", None),
    ],
)
def test_special_tokens_in_a_question(question, found):
    added = {
        7: SimpleNamespace(content="<|image_pad|>", special=True),
        8: SimpleNamespace(content="a", special=False),
    }
    tokenizer = SimpleNamespace(all_special_tokens=["<|im_end|>", ""], added_tokens_decoder=added)
    assert chat.special_in(question, SimpleNamespace(tokenizer=tokenizer)) == found
    assert chat.special_in(question, tokenizer) == found


@pytest.mark.parametrize("flags", [["--step", "-1"], ["--steps", "0"]], ids=" ".join)
def test_inspect_data(flags, capsys):
    with pytest.raises(SystemExit) as caught:
        inspect_data.main(["--output", "x.html", *flags])
    assert caught.value.code == 2
    assert flags[0] in capsys.readouterr().err.splitlines()[-1]


def test_check_parity(capsys, tmp_path):
    with pytest.raises(SystemExit) as caught:
        parity.parse(["--hf-path", "x", "--report", str(tmp_path / "nowhere" / "parity.md")])
    assert caught.value.code == 2
    assert "its folder does not exist" in capsys.readouterr().err


@pytest.mark.parametrize("flags", [["--batch-size", "0"], ["--max-new-tokens", "-1"]], ids=" ".join)
def test_evaluate(flags, capsys):
    with pytest.raises(SystemExit) as caught:
        answer.main(["--checkpoint", "nowhere", "--data", "nowhere", *flags])
    assert caught.value.code == 2
    assert f"{flags[0][2:].replace('-', '_')}={flags[1]} is not at least 1" in capsys.readouterr().err
