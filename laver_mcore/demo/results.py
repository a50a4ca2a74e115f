"""What runs and evaluations wrote, as the report reads it."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One held-out question with the right answer and the model's."""

    key: str
    image: Path
    question: str
    expected: str
    answer: str

    @property
    def correct(self) -> bool:
        """Whether the whole answer is right, surrounding space aside."""
        return self.answer.strip() == self.expected.strip()


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage of one run: the name of its folder and the rows of its `metrics.jsonl`."""

    name: str
    rows: list[Row]

    @property
    def last_iteration(self) -> int:
        """Where the stage ended."""
        return int(self.rows[-1]["iteration"])

    def series(self, metric: str) -> tuple[list[int], list[float]]:
        """(iterations, values) of the rows that have `metric`; empty where the stage does not log it."""
        points = [(row["iteration"], row[metric]) for row in self.rows if row.get(metric) is not None]
        return [iteration for iteration, _ in points], [float(value) for _, value in points]


def read_stage(folder: Path) -> Stage:
    """Read the metrics of one run folder."""
    rows = _read_lines(folder / "metrics.jsonl", "the --save folder of a run that has trained")
    return Stage(name=folder.name, rows=rows)


def read_answers(path: Path) -> list[Answer]:
    """Read answers; a relative image path counts from the working folder, or from the answers file's."""
    answers = []
    for row in _read_lines(path, "the answers file of an evaluation"):
        image = Path(row["image"])
        if not image.is_file():
            image = path.parent / row["image"]
        texts = {field: str(row[field]) for field in ("key", "question", "expected", "answer")}
        answers.append(Answer(image=image, **texts))
    return answers


def _read_lines(path: Path, wanted: str) -> list[Row]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError:
        raise ValueError(f"{path}: no such file; give {wanted}") from None
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number < len(lines):  # the last line may be cut short by a killed run
                raise ValueError(f"{path}:{number}: broken JSON ({error.msg})") from None
    if not rows:
        raise ValueError(f"{path}: holds no rows; give {wanted}")
    return rows


def spread(answers: list[Answer], count: int) -> list[Answer]:
    """Return at most `count` answers, evenly spaced over the file: nobody chose them."""
    count = min(count, len(answers))
    return [answers[index * len(answers) // count] for index in range(count)]


def digit_scores(answers: Path) -> dict[str, tuple[int, int]]:
    """Page -> (digits answered right, each at its place, all digits); questions that name none do not count."""
    scores: dict[str, tuple[int, int]] = {}
    for line in answers.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        expected, answer = row["expected"].split(), row["answer"].split()
        if all(word.isdigit() for word in expected):
            right, total = scores.get(row["key"], (0, 0))
            right += sum(a == b for a, b in zip(expected, answer, strict=False))
            scores[row["key"]] = (right, total + len(expected))
    return scores


def digit_accuracy(answers: Path) -> float:
    """Share of held-out digits answered right, each at its place."""
    right, total = np.sum(list(digit_scores(answers).values()), axis=0)
    return float(right / total)


@dataclass(frozen=True, kw_only=True)
class Difference:
    """How much more of the held-out digits one run reads than another, as a share, with its 95 % interval."""

    mean: float
    low: float
    high: float
    num_pages: int
    num_digits: int

    def sentence(self, name: str, other: str) -> str:
        """What may be said of it."""
        if self.low > 0:
            verdict = f"{name} reads better"
        elif self.high < 0:
            verdict = f"{name} reads worse"
        else:
            verdict = "no difference that so many pages can show"
        return (
            f"On {self.num_digits:,} held-out digits of {self.num_pages} pages {name} changed accuracy by "
            f"{100 * self.mean:+.1f} points against {other} (95 % interval {100 * self.low:+.1f} to "
            f"{100 * self.high:+.1f}, over pages, one seed): {verdict}."
        )


def difference(answers: Path, others: Path, *, draws: int = 10_000) -> Difference:
    """Of two runs on the same pages: pages are drawn anew (bootstrap), as digits of one page are not independent."""
    ours, theirs = digit_scores(answers), digit_scores(others)
    if ours.keys() != theirs.keys():
        raise ValueError(f"{answers} and {others} are not answers about the same pages")
    pairs_P4 = np.array([(*ours[key], *theirs[key]) for key in ours], dtype=np.float64)

    def gap(sums: NDArray[np.float64]) -> NDArray[np.float64]:
        return sums[..., 0] / sums[..., 1] - sums[..., 2] / sums[..., 3]

    drawn = np.random.default_rng(0).integers(len(pairs_P4), size=(draws, len(pairs_P4)))
    low, high = np.quantile(gap(pairs_P4[drawn].sum(1)), (0.025, 0.975))
    mean = gap(pairs_P4.sum(0))
    return Difference(
        mean=float(mean),
        low=float(low),
        high=float(high),
        num_pages=len(pairs_P4),
        num_digits=int(pairs_P4[:, 1].sum()),
    )
