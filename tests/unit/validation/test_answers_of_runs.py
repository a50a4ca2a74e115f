"""What is asked of a model and what is written down, with a stand-in that answers by rote."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import sentencepiece
from PIL import Image
from sample_run import WORDS, write_tokenizer

from laver_mcore import generate as generation
from laver_mcore.config.schema import Config, DataConfig
from laver_mcore.data.images.processors import PatchImageProcessor
from laver_mcore.data.records.conversation import load_records
from laver_mcore.data.sequence.tokenizer import load_tokenizer
from laver_mcore.demo.results import digit_accuracy
from laver_mcore.validation.answers import Reader, answer, questions_of

SYSTEM = "You are a helpful assistant."
ANSWERS = ["red", "left right", "two"]


@pytest.fixture
def asked(tmp_path, monkeypatch):
    """Two dialogues with three questions; what the model was given, batch by batch, and the rows that came of it."""
    write_tokenizer(tmp_path / "tokenizer.model", [" ".join(WORDS)] * 10 + [SYSTEM])
    for name in ("a.png", "b.png"):
        Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / name)

    def turns(*texts):
        return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]

    records = [
        {"id": "first", "image": ["a.png", "b.png"],
         "conversations": turns("<image>\n<image>\nred green", "up down", "left", " right ")},
        {"id": "second", "conversations": turns("how many", "few")},
    ]  # fmt: skip
    (tmp_path / "data.json").write_text(json.dumps(records))
    given = []
    answers = iter(ANSWERS)
    tokenizer = load_tokenizer(tmp_path / "tokenizer.model")

    def generate(network, prompts, images, processor, *, stop_token, max_new_tokens):
        given.append((prompts, len(images), stop_token, max_new_tokens))
        return [tokenizer.encode(next(answers)) for _ in prompts]

    monkeypatch.setattr(generation, "generate", generate)
    topology = SimpleNamespace(is_last_rank=False)
    network = SimpleNamespace(config=Config(data=DataConfig(system_prompt=SYSTEM)), topology=topology)
    processor = PatchImageProcessor(image_size=8, patch_size=4)
    samples = load_records(tmp_path / "data.json", tmp_path)
    reader = Reader(tokenizer=tokenizer, processor=processor, batch_size=2, max_new_tokens=7)
    rows = answer(questions_of(samples), network, reader)
    model = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    return SimpleNamespace(
        given=given, rows=rows, model=model, folder=tmp_path, network=network, reader=reader
    )


def test_each_question_follows_the_right_answers_before_it(asked):
    """Not the model's own; each prompt has the system prompt and every image of its dialogue, and awaits an answer."""
    image = f"<|vision_start|>{'<|image_pad|>' * 4}<|vision_end|>"
    system = f"<|im_start|>system\n{SYSTEM}<|im_end|>\n"
    first = f"<|im_start|>user\n{image}\n{image}\nred green<|im_end|>\n<|im_start|>assistant\n"
    second = f"{first}up down<|im_end|>\n<|im_start|>user\nleft<|im_end|>\n<|im_start|>assistant\n"
    third = "<|im_start|>user\nhow many<|im_end|>\n<|im_start|>assistant\n"
    prompts = [prompt for batch, *_ in asked.given for prompt in batch]
    for prompt, text in zip(prompts, (first, second, third), strict=True):
        assert prompt.token_ids_L.tolist() == asked.model.encode(system + text)
    batches = [(len(batch), *rest) for batch, *rest in asked.given]
    stop = asked.model.piece_to_id("<|im_end|>")
    assert batches == [(2, 4, stop, 7), (1, 0, stop, 7)]


def test_a_row_a_question(asked):
    picture = str(asked.folder / "a.png")
    assert asked.rows == [
        {"key": "first", "image": picture, "question": "red green", "expected": "up down", "answer": "red"},
        {"key": "first", "image": picture, "question": "left", "expected": "right", "answer": "left right"},
        {"key": "second", "image": None, "question": "how many", "expected": "few", "answer": "two"},
    ]


# Which of the two pictures of the first dialogue is broken, and how.
BROKEN = {
    "first": ("a.png", b"<html>"),
    "second": ("b.png", b""),
    "gone": ("a.png", None),
}


@pytest.mark.parametrize(("name", "content"), BROKEN.values(), ids=BROKEN)
def test_a_broken_picture_costs_its_own_questions_alone(asked, name, content, monkeypatch):
    picture = asked.folder / name
    picture.unlink() if content is None else picture.write_bytes(content)
    samples = load_records(asked.folder / "data.json", asked.folder, check_files=False)
    monkeypatch.setattr(
        generation, "generate", lambda network, prompts, *_, **__: [asked.model.encode("two")] * len(prompts)
    )
    rows = answer(questions_of(samples), asked.network, asked.reader)
    assert [row["answer"] for row in rows] == ["", "", "two"]
    assert [str(picture) in row.get("error", "") for row in rows] == [True, True, False]
    assert [{k: v for k, v in row.items() if k not in ("answer", "error")} for row in rows] == [
        {k: v for k, v in row.items() if k != "answer"} for row in asked.rows
    ]


# Right answers, the model's -> right digits, digits.
DIGITS = {
    "all": (["4 7 1"], ["4 7 1"], 3, 3),
    "each_at_its_place": (["4 7 1"], ["7 4 1"], 1, 3),
    "too_short": (["4 7 1"], ["4"], 1, 3),
    "too_long": (["4"], ["4 7 1"], 1, 1),
    "digits_and_not_answers_weigh_the_same": (["4", "1 2 3"], ["4", "9 9 9"], 1, 4),
    "photographs_do_not_count": (["4", "a cat"], ["4", "a dog"], 1, 1),
    "words_for_a_digit": (["4"], ["a cat"], 0, 1),
}


@pytest.mark.parametrize(("expected", "answers", "right", "total"), DIGITS.values(), ids=DIGITS)
def test_digit_accuracy(tmp_path, expected, answers, right, total):
    pairs = zip(expected, answers, strict=True)
    rows = [{"key": str(i), "expected": e, "answer": a} for i, (e, a) in enumerate(pairs)]
    (tmp_path / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert digit_accuracy(tmp_path / "answers.jsonl") == right / total
