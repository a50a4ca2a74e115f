"""What `laver diagnose` asks, and what it says of a directory that is no model."""

import json

import pytest
from PIL import Image

from laver_mcore.cli import diagnose
from laver_mcore.config.errors import ConfigError


def write(folder, answers):
    """A dialogue about one picture for each answer."""
    Image.new("RGB", (8, 8)).save(folder / "a.png")
    records = []
    for number, answer in enumerate(answers):
        turns = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": answer}]
        records.append({"id": str(number), "image": "a.png", "conversations": turns})
    (folder / "data.json").write_text(json.dumps(records))
    return diagnose.parse(["--model", str(folder / "model"), "--data", str(folder / "data.json")])


def test_dialogues_without_a_word_of_answer_are_passed_over(tmp_path):
    asked = diagnose.questions(write(tmp_path, ["red", "", " \n", "blue"]))
    assert [question.answer for question in asked] == ["red", "blue"]


def test_too_few_answers_are_one_line(tmp_path):
    with pytest.raises(ConfigError, match=r"1 dialogue\(s\) with one picture and an answer"):
        diagnose.questions(write(tmp_path, ["red", ""]))


@pytest.mark.parametrize(
    "config",
    ["{}", '{"model_type": "no_such"}', '{"model_type": "llava"}', "{"],
    ids=["empty", "unknown", "no weights", "broken"],
)
def test_what_transformers_cannot_load_is_one_line(config, tmp_path):
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(ConfigError) as caught:
        diagnose.load(tmp_path, False)
    assert str(caught.value).startswith(f"{tmp_path} cannot be loaded by transformers (")
    assert "\n" not in str(caught.value)
