"""The demo's data: right answers, nothing shared with the held-out pages, an exact and short tokenizer."""

import json
import re

import numpy as np
import pytest
import sentencepiece
from PIL import Image

from laver_mcore.data.records.conversation import load_records
from laver_mcore.data.sequence.prompt import encode_sample
from laver_mcore.data.sequence.tokenizer import load_tokenizer
from laver_mcore.demo import conversations
from laver_mcore.demo.pages import (
    PHOTOGRAPHS,
    Page,
    digit_page,
    load_photographs,
    load_scans,
    photograph_page,
)
from laver_mcore.demo.tokenizer import CHAT_MARKS, ROLES
from tools.prepare_demo import main, prepare

DIGITS = np.array([[4, 7, 1], [0, 2, 3], [9, 9, 5]])
PAGE = Page(picture=np.zeros((48, 48, 3), np.uint8), digits=DIGITS)
FILES = ("align", "train", "instruct", "heldout")


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    output = tmp_path_factory.mktemp("demo")
    prepare(output, num_pages=300, num_heldout=20, photograph_share=0.1)
    return output


def cells_asked(question):
    numbers = [int(number) - 1 for number in re.findall(r"\d", question)]
    if "row" in question and "column" in question:
        return [tuple(numbers)]
    line = numbers[0]
    return [(line, i) if "row" in question else (i, line) for i in range(3)]


@pytest.mark.parametrize("ask", [conversations.line_turns, conversations.mixed_turns])
@pytest.mark.parametrize("seed", range(8))
def test_answers_are_right_and_no_cell_is_asked_twice(ask, seed):
    turns = ask(PAGE, np.random.default_rng(seed))
    assert len(turns) == 3
    seen = []
    for question, answer in turns:
        cells = cells_asked(question)
        assert answer == " ".join(str(DIGITS[cell]) for cell in cells)
        seen += cells
    assert len(seen) == len(set(seen))


def test_a_caption_reads_the_page_out():
    assert conversations.caption_turns(PAGE) == [("Read the page.", "4 7 1\n0 2 3\n9 9 5")]


def test_held_out_scans_are_never_trained_on():
    train, heldout = load_scans()
    assert len(train.labels) + len(heldout.labels) == 1797
    assert len(heldout.labels) == 300
    trained = {scan.tobytes() for scan in train.ink}
    assert not any(scan.tobytes() in trained for scan in heldout.ink)
    for scans in (train, heldout):
        assert np.bincount(scans.labels, minlength=10).min() > 0.07 * len(scans.labels)


def test_a_page_shows_its_digits():
    """The page's own cells, against the scan that the label belongs to: dark where the scan has ink."""
    scans, _ = load_scans()
    page = digit_page(scans, np.random.default_rng(0))
    assert page.picture.shape == (48, 48, 3)
    for (row, column), digit in np.ndenumerate(page.digits):
        cell = page.picture[row * 16 : row * 16 + 16, column * 16 : column * 16 + 16].mean(axis=2)
        darkness = (cell.max() - cell) / (cell.max() - cell.min())
        windows = [darkness[y : y + 14, x : x + 14] for y in range(3) for x in range(3)]
        errors = [np.abs(scans.ink - window).mean(axis=(1, 2)).min() for window in windows]
        best = int(np.argmin(np.abs(scans.ink - windows[int(np.argmin(errors))]).mean(axis=(1, 2))))
        assert scans.labels[best] == digit


def test_photographs_come_without_a_download():
    photographs = load_photographs()
    assert list(photographs) == list(PHOTOGRAPHS)
    page = photograph_page(photographs, np.random.default_rng(1))
    assert page.picture.shape == (48, 48, 3)
    assert page.caption in PHOTOGRAPHS.values()
    turns = conversations.line_turns(page, np.random.default_rng(0))
    assert turns[0] == ("What does the photograph show?", page.caption)
    assert turns[1][1] == ("yes" if page.in_colour else "no")


def test_files_are_what_the_loader_reads(demo):
    assert {path.name for path in demo.iterdir()} == {
        *(f"{f}.json" for f in FILES),
        "images",
        "tokenizer.model",
    }
    for file, count in zip(FILES, (150, 300, 150, 20), strict=True):
        samples = load_records(demo / f"{file}.json", demo)
        assert len(samples) == count
        assert len({sample.key for sample in samples}) == count
        with Image.open(samples[0].images[0]) as image:
            assert image.size == (48, 48)
            assert image.format == "JPEG"


def test_training_and_held_out_images_are_apart(demo):
    records = {file: json.loads((demo / f"{file}.json").read_text()) for file in FILES}
    assert all(r["image"].startswith("images/heldout/") for r in records["heldout"])
    for file in FILES[:3]:
        kinds = {r["image"].split("/")[1] for r in records[file]}
        assert kinds == ({"named", "unnamed"} if file == "train" else {"named"})


def test_text_names_no_digit_of_unnamed_pages(demo):
    records = json.loads((demo / "train.json").read_text())
    texts = {r["conversations"][1]["value"] for r in records if r["image"].startswith("images/unnamed/")}
    assert texts <= {"a page of handwritten digits", *PHOTOGRAPHS.values()}
    assert len(texts) > 2


def test_named_pages_are_made_of_few_scans(demo):
    training, _ = load_scans()
    assert len(training.first(150).labels) == 150
    assert np.bincount(training.first(150).labels, minlength=10).min() >= 10


def test_conversations_are_short(demo):
    tokenizer = load_tokenizer(demo / "tokenizer.model")
    lengths = {}
    for file in FILES:
        samples = load_records(demo / f"{file}.json", demo)
        encoded = [encode_sample(s.turns, [(3, 3)], tokenizer, system_prompt="") for s in samples]
        lengths[file] = max(len(sample) for sample in encoded)
    assert lengths["align"] <= 9 + 40
    assert lengths["train"] == lengths["heldout"] == lengths["align"]
    assert lengths["instruct"] == 9 + 60


TEXTS = [
    "Which digits are in row 2?",
    "4 7 1\n0 2 3",
    "  two  spaces ",
    "\n\nempty lines\n",
    "never seen: Grüße, 漢字",
    "<|im_start|>user\nRead the page.<|im_end|>\n",
]


@pytest.mark.parametrize("text", TEXTS)
def test_the_tokenizer_is_exact(demo, text):
    model = sentencepiece.SentencePieceProcessor(model_file=str(demo / "tokenizer.model"))
    ids = model.encode(text)
    assert model.decode(ids) == text
    assert model.unk_id() not in ids


def test_marks_roles_digits_and_newline_are_single_tokens(demo):
    model = sentencepiece.SentencePieceProcessor(model_file=str(demo / "tokenizer.model"))
    for piece in (*CHAT_MARKS, *ROLES, *"0123456789", "\n"):
        assert model.encode(piece, out_type=str) == [piece]
    assert model.encode("4 7 1", out_type=str) == ["4", "▁", "7", "▁", "1"]
    assert len(model.encode("Which digits are in column 3?")) == 4
    assert model.vocab_size() == 384


def test_same_seed_same_bytes(tmp_path):
    def contents(name, seed):
        output = tmp_path / name
        prepare(output, num_pages=12, num_heldout=4, seed=seed)
        return {path.relative_to(output): path.read_bytes() for path in output.rglob("*") if path.is_file()}

    first = contents("first", 1)
    assert contents("again", 1) == first
    assert contents("other", 2) != first
    assert contents("first", 1) == first  # over an older one


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param(["--pages", "0"], "at least one", id="no pages"),
        pytest.param(["--page-side", "50"], "multiple of 24", id="page side"),
    ],
)
def test_bad_arguments_exit_with_status_2(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.setattr("sys.argv", ["prepare_demo.py", "--output", str(tmp_path / "out"), *arguments])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
