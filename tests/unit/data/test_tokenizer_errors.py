"""Tokenizers that cannot be used, named in one line."""

import json
import shutil

import pytest

from laver_mcore.data.errors import DataError
from laver_mcore.data.sequence.tokenizer import load_tokenizer


@pytest.mark.parametrize(
    ("kind", "special", "words"),
    [
        (
            "hugging_face",
            ("<|im_end|>",),
            r"lacks <\|im_start\|>, which its chat template writes; give another",
        ),
        (
            "sentencepiece",
            ("<|im_end|>",),
            r"lacks <\|im_start\|>, which its chat template writes; give another",
        ),
        (
            "sentencepiece",
            ("<|im_start|>",),
            r"ends an answer with '<\|im_end\|>\\n', which has no special token",
        ),
    ],
)
def test_tokens_that_the_template_wants_are_named(kind, special, words, builders, tmp_path):
    path = builders[kind](tmp_path, special)
    with pytest.raises(DataError, match=words):
        load_tokenizer(path)


@pytest.mark.parametrize("kind", ["hugging_face", "sentencepiece"])
def test_tokens_for_vision_follow_the_vocabulary(kind, builders, tmp_path):
    whole = load_tokenizer(builders[kind](tmp_path, ("<|im_start|>", "<|im_end|>", "<|image_pad|>")))
    own = whole.vocab_size - 2
    assert whole.added == {"<|vision_start|>": own, "<|vision_end|>": own + 1}
    special = whole.special
    assert (special.vision_start, special.vision_end) == (own, own + 1)
    assert special.image_pad < own
    assert whole.decode([own, *whole.encode("row"), own + 1]).strip() == "row"
    shown = whole.decode([own, own + 1], skip_special_tokens=False)
    assert shown == "<|vision_start|><|vision_end|>"


@pytest.mark.parametrize("kind", ["nothing", "empty directory", "other file", "broken model"])
def test_no_tokenizer(kind, tmp_path):
    path = {
        "nothing": tmp_path / "nowhere",
        "empty directory": tmp_path,
        "other file": tmp_path / "vocab.txt",
        "broken model": tmp_path / "broken.model",
    }[kind]
    if path.suffix:
        path.write_text("no tokenizer")
    with pytest.raises(DataError, match=path.name) as caught:
        load_tokenizer(path)
    assert "\n" not in str(caught.value)


def test_a_model_type_that_the_library_does_not_know(hugging_face_path, tmp_path):
    shutil.copytree(hugging_face_path, tmp_path / "other")
    file = tmp_path / "other" / "tokenizer.json"
    content = json.loads(file.read_text())
    content["model"]["type"] = "Unheard"
    file.write_text(json.dumps(content))
    with pytest.raises(DataError, match="cannot load a tokenizer from here") as caught:
        load_tokenizer(tmp_path / "other")
    assert "\n" not in str(caught.value)
