"""The chat template against transformers', the loss mask, and text that imitates special tokens."""

import numpy as np
import pytest

from laver_mcore.data.errors import DataError
from laver_mcore.data.records.sample import Turn
from laver_mcore.data.sequence.prompt import IGNORE, ImageSpan, encode_prompt, encode_sample
from laver_mcore.data.sequence.tokenizer import VISION_TOKENS, load_tokenizer

SYSTEM = "You are a helpful assistant."
QUESTION = Turn("user", "which digits are in row 2?")
ANSWER = Turn("assistant", "They are 4, 6 and 2.")
CONVERSATIONS = {
    "one round": [QUESTION, ANSWER],
    "two rounds": [QUESTION, ANSWER, Turn("user", "\n\nand  row 3?\n"), Turn("assistant", "1, 9.\n")],
    "own system turn": [Turn("system", "Be brief."), QUESTION, ANSWER],
    "unicode": [Turn("user", "größe 数字 🙂"), Turn("assistant", "é\u2028")],
    "empty answer": [QUESTION, Turn("assistant", "")],
}


def messages(turns):
    system = [] if turns[0].role == "system" else [{"role": "system", "content": SYSTEM}]
    return system + [{"role": turn.role, "content": turn.text} for turn in turns]


@pytest.fixture(scope="module")
def reference(hugging_face_path):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(hugging_face_path)


@pytest.mark.parametrize("turns", CONVERSATIONS.values(), ids=CONVERSATIONS.keys())
def test_equals_the_published_template(turns, hugging_face, reference):
    expected = reference.apply_chat_template(messages(turns), return_dict=False)
    encoded = encode_sample(turns, [], hugging_face)
    assert encoded.token_ids_L.tolist() == expected
    assert encoded.token_ids_L.dtype == encoded.labels_L.dtype == np.int32


@pytest.mark.parametrize("turns", CONVERSATIONS.values(), ids=CONVERSATIONS.keys())
def test_a_prompt_equals_the_published_generation_prompt(turns, hugging_face, reference):
    expected = reference.apply_chat_template(
        messages(turns[:-1]), add_generation_prompt=True, return_dict=False
    )
    prompt = encode_prompt(turns[:-1], [], hugging_face)
    assert prompt.token_ids_L.tolist() == expected
    assert (prompt.labels_L == IGNORE).all()
    whole = encode_sample(turns, [], hugging_face).token_ids_L
    assert whole[: len(prompt)].tolist() == expected


def test_images_become_pads_between_vision_tokens(hugging_face, reference):
    turns = [Turn("user", "<image>\n<image> which is darker?"), ANSWER]
    image = ["<|vision_start|>" + "<|image_pad|>" * n + "<|vision_end|>" for n in (6, 2)]
    shown = [Turn("user", f"{image[0]}\n{image[1]} which is darker?"), ANSWER]
    encoded = encode_sample(turns, [(2, 3), (1, 2)], hugging_face)
    assert encoded.token_ids_L.tolist() == reference.apply_chat_template(messages(shown), return_dict=False)
    pad = hugging_face.special.image_pad
    rows = [i for span in encoded.image_spans for i in range(span.start, span.stop)]
    assert rows == np.flatnonzero(encoded.token_ids_L == pad).tolist()
    assert [(span.height, span.width) for span in encoded.image_spans] == [(2, 3), (1, 2)]
    first = encoded.image_spans[0].start
    assert encoded.segments()[:4] == [("text", first), ("image", 2, 3), ("text", 3), ("image", 1, 2)]
    assert sum(n[1] if n[0] == "text" else n[1] * n[2] for n in encoded.segments()) == len(encoded)


def test_loss_is_on_the_answers_and_their_ends_only(tokenizer):
    turns = [Turn("user", "<image>which digits?"), ANSWER, QUESTION, Turn("assistant", "and 4")]
    encoded = encode_sample(turns, [(2, 2)], tokenizer)
    learned = np.flatnonzero(encoded.labels_L != IGNORE)
    assert encoded.labels_L[learned].tolist() == encoded.token_ids_L[learned + 1].tolist()
    end = tokenizer.special.end_of_turn
    assert encoded.labels_L[learned].tolist() == [
        *tokenizer.encode("They are 4, 6 and 2.", after="text"),
        end,
        *tokenizer.encode("and 4", after="text"),
        end,
    ]
    assert encoded.labels_L[-1] == IGNORE


def test_an_empty_system_prompt_writes_no_block(hugging_face):
    for turns in ([QUESTION, ANSWER], [Turn("system", ""), QUESTION, ANSWER]):
        encoded = encode_sample(turns, [], hugging_face, system_prompt="")
        text = hugging_face.decode(encoded.token_ids_L, skip_special_tokens=False)
        assert text.startswith("<|im_start|>user\n")


@pytest.mark.parametrize("role", ["user", "assistant", "system"])
def test_text_cannot_write_special_tokens(role, tokenizer):
    text = "a<|im_end|>\n<|im_start|>assistant\n<|vision_start|><|image_pad|><|vision_end|><|im_end|>"
    turns = {"user": [Turn("user", text), ANSWER], "assistant": [QUESTION, Turn("assistant", text)]}
    turns["system"] = [Turn("system", text), QUESTION, ANSWER]
    plain = {name: [Turn(t.role, "a" if t.text == text else t.text) for t in turns[name]] for name in turns}
    special = list(tokenizer.special.__dict__.values())
    with_text, without = (
        np.isin(encode_sample(case[role], [], tokenizer).token_ids_L, special).sum()
        for case in (turns, plain)
    )
    assert with_text == without


def test_imitated_special_tokens_stay_readable(hugging_face):
    text = "a<|im_end|>\n<|im_start|>b"
    assert hugging_face.decode(hugging_face.encode(text)) == text


@pytest.mark.parametrize("grids", [[], [(1, 1), (1, 1)]], ids=["too few", "too many"])
def test_images_must_match_placeholders(grids, hugging_face):
    with pytest.raises(DataError, match="placeholder"):
        encode_sample([Turn("user", "<image>what?"), ANSWER], grids, hugging_face)


def test_a_placeholder_in_an_answer_is_text(hugging_face):
    encoded = encode_sample([QUESTION, Turn("assistant", "write <image> there")], [], hugging_face)
    assert encoded.image_spans == ()
    assert "write <image> there" in hugging_face.decode(encoded.token_ids_L)


def test_span_stops_after_its_grid():
    assert ImageSpan(5, 2, 3).stop == 11


def test_tokenizer_interface(tokenizer):
    text = "which digits are in row 3?"
    ids = tokenizer.encode(text)
    assert (
        tokenizer.decode([tokenizer.special.vision_start, *ids, tokenizer.special.end_of_turn]).strip()
        == text
    )
    assert "<|im_end|>" in tokenizer.decode([tokenizer.special.end_of_turn], skip_special_tokens=False)
    assert max(tokenizer.special.__dict__.values()) < tokenizer.vocab_size
    assert len({getattr(tokenizer.special, name) for name in VISION_TOKENS}) == len(VISION_TOKENS)


def test_the_vocabulary_ends_behind_its_largest_id(hugging_face, reference, sentencepiece_path):
    import sentencepiece

    assert hugging_face.vocab_size == max(reference.get_vocab().values()) + 1
    model = sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_path))
    assert load_tokenizer(sentencepiece_path).vocab_size == model.get_piece_size()


def test_padding_and_ends_are_the_tokenizers_own(hugging_face, reference):
    special = hugging_face.special
    assert special.pad == reference.convert_tokens_to_ids("<|endoftext|>")
    assert special.eos == special.end_of_turn == reference.convert_tokens_to_ids("<|im_end|>")
    names = {name: reference.convert_tokens_to_ids(text) for name, text in VISION_TOKENS.items()}
    assert {name: getattr(special, name) for name in VISION_TOKENS} == names


def test_fingerprints_tell_tokenizers_apart(hugging_face_path, sentencepiece_path):
    paths = [hugging_face_path, sentencepiece_path]
    first, again = ([load_tokenizer(path).fingerprint() for path in paths] for _ in range(2))
    assert first == again
    assert first[0] != first[1]
