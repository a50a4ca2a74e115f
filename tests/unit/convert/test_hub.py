"""The files that go with an exported model, against definitions: positions, mask, pixels, prompt, tokens."""

from types import SimpleNamespace

import numpy as np
import pytest
import sentencepiece
import torch
from PIL import Image
from sample_run import WORDS, write_tokenizer

from laver_mcore.convert.hub.modeling_laver import LaverRotaryEmbedding, lay_out, mixed_mask
from laver_mcore.convert.hub.processing_laver import LaverImageProcessor, to_rgb
from laver_mcore.convert.tokenizer_export import chat_template, export_tokenizer, fast_tokenizer

PAD = 9
"""Id of the visual token."""
# Text, a 2 x 3 image, text, a 1 x 2 image beside a 2 x 1 one, text; the second sequence is padded on the left.
FIRST = [1, 2, *[PAD] * 6, 3, *[PAD] * 2, *[PAD] * 2, 4]
SECOND = [0] * 9 + [5, *[PAD] * 2, 6, 7]
GRIDS = [(2, 3), (1, 2), (2, 1), (1, 2)]
IMAGES = [[-1, -1, *[0] * 6, -1, 1, 1, 2, 2, -1], [-1] * 10 + [3, 3, -1, -1]]
# (t, row, column): an image at p has (p, p + r, p + c), the next token p + max(rows, columns).
POSITIONS_2D = [
    [(0, 0, 0), (1, 1, 1), *[(2, 2 + r, 2 + c) for r in range(2) for c in range(3)], (5, 5, 5),
     (6, 6, 6), (6, 6, 7), (8, 8, 8), (8, 9, 8), (10, 10, 10)],
    [(0, 0, 0)] * 9 + [(0, 0, 0), (1, 1, 1), (1, 1, 2), (3, 3, 3), (4, 4, 4)],
]  # fmt: skip
POSITIONS_1D = [[(i,) * 3 for i in range(14)], [(0,) * 3] * 9 + [(i,) * 3 for i in range(5)]]


@pytest.mark.parametrize(
    ("rope_2d", "wanted"), [(True, POSITIONS_2D), (False, POSITIONS_1D)], ids=["2d", "1d"]
)
def test_positions(rope_2d, wanted):
    config = SimpleNamespace(image_token_id=PAD, rope_2d=rope_2d)
    ids, real = torch.tensor([FIRST, SECOND]), torch.ones(2, 14, dtype=torch.long)
    real[1, :9] = 0
    positions, images = lay_out(ids, real, torch.tensor(GRIDS), config)
    assert images.tolist() == IMAGES
    assert positions.permute(1, 2, 0).tolist() == [[list(p) for p in row] for row in wanted]


@pytest.mark.parametrize("mixed", [True, False], ids=["mixed", "causal"])
@pytest.mark.parametrize("past", [0, 9])
def test_mask(mixed, past):
    """Pair by pair: earlier, or of the same image; never padding, which sees itself."""
    real = torch.tensor([[1] * 14, [0] * 9 + [1] * 5])
    images = torch.tensor(IMAGES)
    got = mixed_mask(images[:, past:], real, past, mixed, torch.float32)[:, 0] == 0
    for row in range(2):
        for i in range(past, 14):
            for j in range(14):
                same = mixed and IMAGES[row][i] == IMAGES[row][j] >= 0
                sees = (j <= i or same) and (bool(real[row, j]) or i == j)
                assert got[row, i - past, j] == sees, (row, i, j)


BANDS = {"contiguous": [0, 0, 1, 2, 2, 2], "interleaved": [0, 1, 2, 0, 2, 2]}


@pytest.mark.parametrize("split", BANDS)
def test_rotary_bands(split):
    """Angle = position of the band's axis x base^(-2 f / C): two frequencies of t, one of rows, three of columns."""
    text = SimpleNamespace(head_dim=12, rope_parameters={"rope_theta": 100.0})
    rotary = LaverRotaryEmbedding(
        SimpleNamespace(text_config=text, mrope_section=[2, 1, 3], mrope_split=split)
    )
    positions = torch.tensor([[3, 5], [7, 11], [13, 17]])[:, None]
    cos, sin = rotary(torch.zeros(1), positions)
    for f in range(6):
        axis = BANDS[split][f]
        angle = positions[axis, 0].double() * 100.0 ** (-2 * f / 12)
        for half in (0, 6):
            torch.testing.assert_close(cos[0, :, half + f].double(), angle.cos(), rtol=0, atol=1e-6)
            torch.testing.assert_close(sin[0, :, half + f].double(), angle.sin(), rtol=0, atol=1e-6)


def test_patches_are_cut_row_by_row():
    """Patch (r, c): its pixels channel by channel, 0 to 255 onto -1 to 1."""
    pixels = np.random.default_rng(0).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    processor = LaverImageProcessor(image_grid=[2, 2], image_size=6, patch_size=3)
    found = processor([[Image.fromarray(pixels)]])
    assert found["image_grids"].tolist() == [[2, 2]]
    wanted = [
        [
            pixels[3 * r + y, 3 * c + x, channel] / 127.5 - 1
            for channel in range(3)
            for y in range(3)
            for x in range(3)
        ]
        for r in range(2)
        for c in range(2)
    ]
    torch.testing.assert_close(found["pixel_values"].double(), torch.tensor(wanted), rtol=0, atol=1e-6)


def test_transparency_is_white():
    image = Image.new("RGBA", (1, 1), (10, 20, 30, 0))
    assert to_rgb(image).getpixel((0, 0)) == (255, 255, 255)


CONVERSATION = [
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "red?"}]},
    {"role": "assistant", "content": "yes"},
    {"role": "user", "content": "sure?"},
]
WRITTEN = (
    "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>\nred?<|im_end|>\n"
    "<|im_start|>assistant\nyes<|im_end|>\n<|im_start|>user\nsure?<|im_end|>\n"
)
PROMPTS = {
    "none": ("", CONVERSATION, True, WRITTEN + "<|im_start|>assistant\n"),
    "no_answer_wanted": ("", CONVERSATION, False, WRITTEN),
    "default": ('Say "so".', CONVERSATION, False, f'<|im_start|>system\nSay "so".<|im_end|>\n{WRITTEN}'),
    "given": (
        "Not this.",
        [{"role": "system", "content": "This."}, *CONVERSATION],
        False,
        f"<|im_start|>system\nThis.<|im_end|>\n{WRITTEN}",
    ),
}


@pytest.mark.parametrize(("system", "messages", "ask", "wanted"), PROMPTS.values(), ids=PROMPTS)
def test_chat_template(system, messages, ask, wanted):
    from transformers.utils.chat_template_utils import render_jinja_template

    (written,), _ = render_jinja_template(
        conversations=[messages], chat_template=chat_template(system), add_generation_prompt=ask
    )
    assert written == wanted


@pytest.mark.parametrize(
    "text", ["red green", "  two  spaces", "reddish\nbright", "Größe 7, 東京", "<|im_end|>up"]
)
def test_exported_tokenizer_is_sentencepieces(tmp_path, text):
    from transformers import AutoTokenizer

    source = tmp_path / "tokenizer.model"
    write_tokenizer(source, [" ".join(WORDS)] * 10 + ["You are a helpful assistant."])
    export_tokenizer(source, tmp_path, "")
    exported = AutoTokenizer.from_pretrained(tmp_path)
    model = sentencepiece.SentencePieceProcessor(model_file=str(source))
    assert exported.encode(text, add_special_tokens=False) == model.encode(text)
    named = (exported.eos_token_id, exported.pad_token_id, exported.padding_side)
    # An answer ends at <|im_end|>; the model has no piece for padding, so that its own end of text stands for it.
    assert named == (model.piece_to_id("<|im_end|>"), model.eos_id(), "left")


def test_exported_merges_come_in_sentencepieces_order(tmp_path):
    """Words of four letters in any order have many ways to be merged, of which the first in the order counts."""
    draw = np.random.default_rng(0)

    def words(count):
        return ["".join(draw.choice(list("abcd"), draw.integers(3, 9))) for _ in range(count)]

    source = tmp_path / "tokenizer.model"
    write_tokenizer(source, [" ".join(words(8)) for _ in range(200)])
    model, exported = sentencepiece.SentencePieceProcessor(model_file=str(source)), fast_tokenizer(source)
    for text in words(200):
        assert exported.encode(text).ids == model.encode(text), text
