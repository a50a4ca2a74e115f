"""The demo, from nothing to a report: data, two stages with TP = 2, an LM-only run of equal steps, evaluation.

    python tools/run_demo.py            about six minutes on two CPU cores
    python tools/run_demo.py --short    a minute: everything runs, nothing is learned

Every step is an ordinary command line, printed before it runs. Writes runs/demo/report.md, report.png, summary.json.
"""

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import tyro

from laver_mcore.demo.report import write_report
from laver_mcore.demo.results import difference, digit_accuracy

CHANCE = 0.1
"""Ten digits, equally frequent."""

LM_ONLY = ("--objective", "lm", "--trainable", "connector.*", "language_model.*")


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Train, evaluate and report the demo."""

    output: Path = Path("runs/demo")
    """Folder of all runs and of the report; emptied first."""
    data: Path = Path("data/demo")
    """Folder of the demo's data; written if it is not there."""
    tensor_model_parallel_size: int | None = None
    """Processes, each with its part of every layer: two, or one on a machine with a single GPU."""
    short: bool = False
    """A tenth of the steps, to see that everything runs."""


def _run(*command: str) -> None:
    shown = [Path(part).name if part == sys.executable else part for part in command]
    print(f"\n$ {shlex.join(shown)}", flush=True)
    environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    subprocess.run(command, check=True, env=environment)


def _prepare(arguments: Arguments) -> None:
    """Write the data, unless it is there; that of a short run is too little for a whole one."""
    is_short = arguments.data / "short"
    if (arguments.data / "heldout.json").is_file() and (arguments.short or not is_short.exists()):
        return
    pages = ("--pages", "1000", "--heldout", "20") if arguments.short else ()
    _run(sys.executable, "tools/prepare_demo.py", "--output", str(arguments.data), *pages)
    if arguments.short:
        is_short.touch()
    else:
        is_short.unlink(missing_ok=True)


def ranks_for(num_gpus: int) -> int:
    """How many processes share the demo's model."""
    return min(2, num_gpus or 2)


def _torchrun(arguments: Arguments, *command: str) -> None:
    ranks = str(arguments.tensor_model_parallel_size or ranks_for(torch.cuda.device_count()))
    launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", ranks)
    _run(*launcher, *command, "--tensor-model-parallel-size", ranks)


def _train(arguments: Arguments, name: str, stage: int, *extra: str) -> Path:
    save = arguments.output / name
    steps = ("--train-iters", "20", "--lr-warmup-iters", "5") if arguments.short else ()
    recipe = f"examples/demo/stage{stage}.yaml"
    _torchrun(arguments, "pretrain_laver.py", "--config", recipe, "--save", str(save), *steps, *extra)
    return save


def _evaluate(arguments: Arguments, *runs: Path) -> list[Path]:
    heldout = str(arguments.data / "heldout.json")
    folders = [str(run) for run in runs]
    command = ("--checkpoint", *folders, "--data", heldout, "--max-new-tokens", "20")
    _torchrun(arguments, "tools/evaluate.py", *command)
    return [run / "answers.jsonl" for run in runs]


def _diagnose(arguments: Arguments, laver: Path, lm_only: Path) -> tuple[str, dict[str, Path]]:
    """What LaVer's student made of masked tokens, in a sentence, and pictures by title."""
    folder = arguments.output / "diagnosis"
    models = ("--model", str(laver), str(lm_only), "--teacher-of", str(laver))
    data = (
        "--data",
        str(arguments.data / "heldout.json"),
        "--num-questions",
        "2" if arguments.short else "8",
    )
    quick = ("--skip", "accuracy", "states", "--output", str(folder))
    _run(sys.executable, "tools/diagnose.py", *models, *data, *quick)
    found = json.loads((folder / "diagnosis.json").read_text(encoding="utf-8"))
    return found["masked"][str(laver)], {
        "Masked tokens, and the teacher's tokens nearest to what the student made of them": folder
        / "masked.png",
        "Attention of an answer's first token, by layer": folder / "attention.png",
        "Cosines of a page's visual tokens in the last layer": folder / "gram.png",
    }


def run_demo(arguments: Arguments) -> dict[str, Any]:
    """Run everything; returns what summary.json holds."""
    started = time.monotonic()
    _prepare(arguments)
    shutil.rmtree(arguments.output, ignore_errors=True)
    align = _train(arguments, "stage1", 1)
    laver = _train(arguments, "stage2", 2, "--pretrained-checkpoint", str(align))
    lm_only = _train(arguments, "lm_only_stage2", 2, "--pretrained-checkpoint", str(align), *LM_ONLY)
    answers, lm_answers = _evaluate(arguments, laver, lm_only)
    masked, pictures = _diagnose(arguments, laver, lm_only)
    gap = difference(answers, lm_answers)
    summary = {
        "accuracy": digit_accuracy(answers),
        "chance": CHANCE,
        "lm_only_accuracy": digit_accuracy(lm_answers),
        "difference": asdict(gap),
        "sentence": "A shortened demo says nothing about what LaVer changes: neither run has learned to read."
        if arguments.short
        else gap.sentence("LaVer", "the language model's loss alone"),
        "masked": masked,
        "seconds": round(time.monotonic() - started, 1),
    }
    (arguments.output / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    runs = {"LaVer": [align, laver], "LM only": [align, lm_only]}
    write_report(arguments.output, runs, answers, summary, pictures)
    return summary


def main() -> int:
    """Command line; returns the exit status of the first step that failed, else 0."""
    arguments = tyro.cli(Arguments, description=__doc__)
    try:
        summary = run_demo(arguments)
    except subprocess.CalledProcessError as error:
        print(
            f"run_demo.py: error: a step failed with exit status {error.returncode} (see above)",
            file=sys.stderr,
        )
        return 1
    print(
        f"\nper digit on held-out pages: LaVer {summary['accuracy']:.1%}, LM only {summary['lm_only_accuracy']:.1%}, "
        f"chance {CHANCE:.0%}; {summary['seconds']:.0f} s"
    )
    print(f"{summary['sentence']}\nreport: {arguments.output / 'report.md'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
