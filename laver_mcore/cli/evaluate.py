"""An exported model on public benchmarks or local tasks, under lmms-eval: a table, and the same as JSON.

    laver eval --model exported --tasks mmstar,ocrbench --trust-remote-code
    laver eval --model exported --tasks laver_demo --include-path examples/eval/tasks --device cpu

lmms-eval (pip install lmms-eval) is what runs; DIR/lmms_eval.log has all that it says, DIR its samples and results.
"""

import argparse
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from laver_mcore.cli.console import refuse
from laver_mcore.config.flags import FlagParser, folder_to_write

Scores = dict[str, dict[str, dict[str, float]]]
"""Task -> metric -> value, and stderr where lmms-eval has one."""


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = FlagParser(__doc__)
    add = parser.add_argument
    add("--model", required=True, type=Path, help="exported directory")
    add("--tasks", required=True, help="names of lmms-eval's tasks, with commas between")
    add("--include-path", type=Path, help="folder of tasks of your own")
    add("--batch-size", type=int, default=1, help="questions answered together")
    add("--limit", type=int, help="first so many questions of each task alone")
    add("--device", default="cuda", help="cuda or cpu")
    add("--output", type=folder_to_write, default=Path("evaluation"), metavar="DIR", help="folder to write")
    add(
        "--trust-remote-code",
        action="store_true",
        help="run the Python files of an exported model's directory",
    )
    args = parser.parse_args(argv)
    parser.want_at_least(1, args, "batch_size", "limit")
    if not (args.model / "config.json").is_file():
        parser.error(f"{args.model} has no config.json; give a directory that `laver export` wrote")
    if (
        "auto_map" in json.loads((args.model / "config.json").read_text("utf-8"))
        and not args.trust_remote_code
    ):
        parser.error(f"{args.model} brings Python code of its own; read it and give --trust-remote-code")
    if importlib.util.find_spec("lmms_eval") is None:
        parser.error("lmms-eval is not installed; examples/eval/README.md says how beside this torch")
    return args


def command(args: argparse.Namespace) -> list[str]:
    """What is run."""
    model = f"pretrained={args.model},device={args.device},trust_remote_code={args.trust_remote_code}"
    words = [
        sys.executable,
        "-m",
        "lmms_eval",
        "--model",
        "laver",
        "--model_args",
        model,
        "--tasks",
        args.tasks,
    ]
    words += ["--batch_size", str(args.batch_size), "--output_path", str(args.output), "--log_samples"]
    words += ["--include_path", str(args.include_path)] if args.include_path else []
    return words + (["--limit", str(args.limit)] if args.limit else [])


def scores(results: dict[str, Any]) -> Scores:
    """What a results file of lmms-eval says, metrics by their plain name."""
    found: Scores = {}
    for task, entries in results["results"].items():
        numbers = {key.partition(",")[0]: value for key, value in entries.items() if isinstance(value, float)}
        found[task] = {
            name: {"value": value}
            | ({"stderr": numbers[f"{name}_stderr"]} if f"{name}_stderr" in numbers else {})
            for name, value in numbers.items()
            if "_stderr" not in name
        }
    return found


def table(found: Scores) -> str:
    """Aligned rows: task, metric, value with its standard error."""
    rows = [("task", "metric", "value")]
    for task, metrics in found.items():
        for name, entry in metrics.items():
            error = f" ± {entry['stderr']:.4f}" if "stderr" in entry else ""
            rows.append((task, name, f"{entry['value']:.4f}{error}"))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def main(argv: list[str]) -> int:
    """Returns the exit status: 0, 1 where lmms-eval fails, 2 for input that cannot be evaluated."""
    args = parse(argv)
    args.output.mkdir(parents=True, exist_ok=True)
    log = args.output / "lmms_eval.log"
    before = set(args.output.rglob("*_results.json"))
    with log.open("w", encoding="utf-8") as file:
        watched = sys.stderr.isatty()  # its progress bars are worth seeing, and write to nothing else
        done = subprocess.run(command(args), stdout=file, stderr=None if watched else file, check=False)
    written = sorted(set(args.output.rglob("*_results.json")) - before)
    if done.returncode or not written:
        last = next(
            (line for line in reversed(log.read_text("utf-8").splitlines()) if line.strip()),
            "it said nothing",
        )
        return refuse(f"lmms-eval ended with status {done.returncode}: {last.strip()} ({log})", status=1)
    found = scores(json.loads(written[-1].read_text("utf-8")))
    (args.output / "scores.json").write_text(json.dumps(found, indent=1), encoding="utf-8")
    print(table(found))
    print(f"as JSON: {args.output / 'scores.json'}")
    return 0
