"""Tokenizers that cannot be used, named in one line."""

import pytest

from laver_mcore.data.errors import DataError
from laver_mcore.data.sequence.tokenizer import CHAT_TOKENS, load_tokenizer

WITHOUT_VISION = ("<|im_start|>", "<|im_end|>", "<|image_pad|>")
assert set(WITHOUT_VISION) < set(CHAT_TOKENS.values())


@pytest.mark.parametrize(
    ("kind", "fix"),
    [
        ("hugging_face", "add them with tokenizer.add_special_tokens"),
        ("sentencepiece", "train the model with them in user_defined_symbols"),
    ],
)
def test_missing_special_tokens_are_listed(kind, fix, builders, tmp_path):
    path = builders[kind](tmp_path, WITHOUT_VISION)
    with pytest.raises(DataError, match=r"lacks <\|vision_start\|>, <\|vision_end\|>; " + fix):
        load_tokenizer(path)


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
