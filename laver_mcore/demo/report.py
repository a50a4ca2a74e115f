"""What a set of runs did, as `report.md` and `report.png`: curves by stage, accuracy, sample pages with
answers.

Reads only what runs write for everybody: `metrics.jsonl` in each run's folder, and one JSON line per held-out
question (`key`, `image`, `question`, `expected`, `answer`).
"""

from pathlib import Path
from typing import Any

from laver_mcore.demo.report_picture import draw_report
from laver_mcore.demo.results import Answer, Stage, read_answers, read_stage, spread


def write_report(
    output_dir: str | Path,
    runs: dict[str, list[Path]],
    answers: str | Path,
    summary: dict[str, Any],
    pictures: dict[str, Path] | None = None,
) -> tuple[Path, Path]:
    """Write `report.md` and `report.png` into `output_dir` and return their paths.

    `runs` maps a name ("LaVer", "LM only") to its run folders, one per stage, in order; the first run is the
    one whose answers are shown. `summary` holds `accuracy`, `chance`, `lm_only_accuracy` (shares, 0 to 1), `masked`
    (what was made of masked tokens, a sentence) and `seconds`; what is absent is left out. `pictures` of the models lie
    below `output_dir`, by title. ValueError if a metrics or answers file is missing, empty or
    broken.
    """
    output = Path(output_dir)
    stages = {name: [read_stage(Path(folder)) for folder in folders] for name, folders in runs.items()}
    questions = read_answers(Path(answers))
    output.mkdir(parents=True, exist_ok=True)
    picture, text = output / "report.png", output / "report.md"
    draw_report(picture, stages, questions, summary)
    shown = {title: path.relative_to(output).as_posix() for title, path in (pictures or {}).items()}
    text.write_text(_markdown(stages, questions, summary, shown), encoding="utf-8")
    return text, picture


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f} %"


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _escape(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " / ").strip() or "(nothing)"


def _markdown(
    stages: dict[str, list[Stage]], answers: list[Answer], summary: dict[str, Any], pictures: dict[str, str]
) -> str:
    exact = sum(answer.correct for answer in answers)
    lines = ["# Report", "", "![Curves and sample pages](report.png)", "", "## Held-out accuracy", ""]
    lines += ["| | accuracy |", "|---|---|"]
    names = list(stages)
    lines.append(f"| {names[0]} | **{_percent(summary.get('accuracy'))}** |")
    if summary.get("lm_only_accuracy") is not None:
        lines.append(f"| LM only, equal steps | {_percent(summary['lm_only_accuracy'])} |")
    lines.append(f"| chance | {_percent(summary.get('chance'))} |")
    if summary.get("sentence"):
        lines += ["", str(summary["sentence"])]
    lines += ["", f"{exact} of {len(answers)} answers of {names[0]} are right as a whole."]
    if summary.get("seconds") is not None:
        lines.append(f"Everything took {summary['seconds']:.0f} seconds.")
    if pictures:
        lines += ["", "## What the models look at", ""]
        lines += [f"{summary['masked']}", ""] if summary.get("masked") else []
        lines += [
            line for title, path in pictures.items() for line in (f"{title}:", "", f"![{title}]({path})", "")
        ]
        lines.pop()
    lines += ["", "## Last values of every stage", "", *_stage_table(stages), "", "## Answers", ""]
    lines += ["| page | question | right answer | answer | |", "|---|---|---|---|---|"]
    for answer in spread(answers, 24):
        verdict = "right" if answer.correct else "wrong"
        fields = (answer.key, answer.question, answer.expected, answer.answer, verdict)
        lines.append("| " + " | ".join(map(_escape, fields)) + " |")
    return "\n".join(lines) + "\n"


def _stage_table(stages: dict[str, list[Stage]]) -> list[str]:
    metrics = ("lm_loss", "mim_loss", "gram_loss", "visual_similarity", "teacher_distance")
    names = " | ".join(name.replace("_", " ") for name in metrics)
    lines = [f"| run | stage | iterations | {names} |", "|---" * (3 + len(metrics)) + "|"]
    for run, members in stages.items():
        for stage in members:
            values = [stage.series(metric)[1] for metric in metrics]
            cells = [run, stage.name, str(stage.last_iteration)]
            lines.append("| " + " | ".join(cells + [_cell(v[-1] if v else None) for v in values]) + " |")
    return lines
