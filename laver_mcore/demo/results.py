"""What runs and evaluations wrote, as the report reads it."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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


def digit_accuracy(answers: Path) -> float:
    """Share of held-out digits answered right, each at its place; questions about photographs do not count."""
    right = total = 0
    for line in answers.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        expected, answer = row["expected"].split(), row["answer"].split()
        if all(word.isdigit() for word in expected):
            total += len(expected)
            right += sum(a == b for a, b in zip(expected, answer, strict=False))
    return right / total
