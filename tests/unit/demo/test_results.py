"""How many digits were read, and what may be said of the difference between two runs."""

import json

import numpy as np
import pytest

from laver_mcore.demo.results import difference, digit_accuracy, digit_scores

EXPECTED = "1 2 3\n4 5 6\n7 8 9"


def write(path, rights):
    """A page for each number: so many of its nine digits right; and a photograph, which does not count."""
    rows = [{"key": "cat", "expected": "a cat", "answer": "a cat"}]
    for page, right in enumerate(rights):
        words = [word if place < right else "0" for place, word in enumerate(EXPECTED.split())]
        rows.append({"key": f"page-{page}", "expected": EXPECTED, "answer": " ".join(words)})
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def test_digits_count_each_at_its_place(tmp_path):
    answers = write(tmp_path / "a.jsonl", [9, 3, 0])
    assert digit_scores(answers) == {"page-0": (9, 9), "page-1": (3, 9), "page-2": (0, 9)}
    assert digit_accuracy(answers) == pytest.approx(12 / 27)


def test_interval_is_that_of_the_mean_over_pages(tmp_path):
    rng = np.random.default_rng(1)
    ours, theirs = rng.integers(5, 10, 200), rng.integers(4, 10, 200)
    found = difference(write(tmp_path / "a.jsonl", ours), write(tmp_path / "b.jsonl", theirs))
    gaps = (ours - theirs) / 9
    error = gaps.std(ddof=1) / len(gaps) ** 0.5
    assert found.mean == pytest.approx(gaps.mean())
    assert (found.num_pages, found.num_digits) == (200, 1800)
    assert found.low == pytest.approx(gaps.mean() - 1.96 * error, abs=0.1 * error)
    assert found.high == pytest.approx(gaps.mean() + 1.96 * error, abs=0.1 * error)


@pytest.mark.parametrize(
    ("ours", "theirs", "words"),
    [
        ([9] * 40, [5] * 40, "LaVer reads better"),
        ([5] * 40, [9] * 40, "LaVer reads worse"),
        ([5, 9] * 20, [9, 5] * 20, "no difference that so many pages can show"),
    ],
    ids=["better", "worse", "neither"],
)
def test_sentence(tmp_path, ours, theirs, words):
    found = difference(write(tmp_path / "a.jsonl", ours), write(tmp_path / "b.jsonl", theirs))
    said = found.sentence("LaVer", "LM only")
    assert words in said
    assert "360 held-out digits of 40 pages" in said


def test_other_pages_are_refused(tmp_path):
    with pytest.raises(ValueError, match="not answers about the same pages"):
        difference(write(tmp_path / "a.jsonl", [1]), write(tmp_path / "b.jsonl", [1, 2]))
