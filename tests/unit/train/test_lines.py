"""An iteration's line for people: what it holds, its width, and the time left against arithmetic by hand."""

import pytest

from laver_mcore.train.lines import ShortLine, _count, _number

ROW = {
    "iteration": 7, "loss": 1.25, "lm_loss": 1.0, "mim_loss": 0.25, "grad_norm": 3.0, "learning_rate": 2e-5,
    "skipped": 0, "tokens_per_second": 12345.0, "mfu": None, "tflops_per_gpu": 0.0,
}  # fmt: skip


def test_what_it_says():
    line = ShortLine(1200)(ROW, 0.34)
    assert line == (
        "    7/1,200  loss  1.2500  lm  1.0000  mim  0.2500  grad  3.0000  lr 2.0e-05   340 ms/it  12.3k tok/s"
        "  0:06:46 left"
    )  # (1200 - 7) x 0.34 s = 405.6 s


@pytest.mark.parametrize(
    ("more", "said", "unsaid"),
    [
        ({"mim_loss": None, "lm_loss": None}, "loss  1.2500  lm          mim          grad", "skipped"),
        ({"mfu": 0.523}, "MFU 52%", ""),
        ({"skipped": 3}, "3 skipped", ""),
        ({"valid_lm_loss": 2.0, "valid_accuracy": 0.875}, "held-out  2.0000", ""),
        ({"valid_lm_loss": 2.0, "valid_accuracy": 0.875}, "held-out accuracy 87.5%", ""),
        ({"valid_lm_loss": None, "valid_accuracy": None}, "left", "held-out"),
        ({"loss": float("nan")}, "loss     nan", ""),
    ],
    ids=lambda value: str(value)[:20],
)
def test_what_a_row_has_besides(more, said, unsaid):
    line = ShortLine(1200)(ROW | more, 0.34)
    assert said in line and (not unsaid or unsaid not in line)


def test_one_term_is_the_loss_itself():
    row = {name: value for name, value in ROW.items() if name != "mim_loss"}
    assert "lm" not in ShortLine(10)(row, 1.0)


def test_lines_are_aligned_and_fit_a_terminal():
    line = ShortLine(1200)
    rows = [ROW | {"iteration": n, "loss": 10.0 ** (3 - n), "mim_loss": None} for n in range(1, 8)]
    lines = [line(row, 0.5) for row in rows]
    assert len({text.index("grad") for text in lines}) == 1
    assert max(map(len, lines)) < 130


def test_time_left_is_told_from_the_newest_lines():
    line = ShortLine(1000)
    for iteration in range(1, 101):
        text = line(ROW | {"iteration": iteration}, 10.0 if iteration <= 50 else 1.0)
    assert text.endswith("0:15:00 left")  # 900 more of a second each


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, ""),
        (0.0, "0.0000"),
        (0.0123456, "0.0123"),
        (0.001234, "1.2e-03"),
        (123.4, "1.2e+02"),
        (-1.5, "-1.5000"),
    ],
)
def test_numbers(value, text):
    assert _number(value) == text


@pytest.mark.parametrize(
    ("value", "text"), [(12.3, "12"), (999.0, "999"), (1234.0, "1.23k"), (1.5e6, "1.5M"), (2e9, "2G")]
)
def test_counts(value, text):
    assert _count(value) == text
