"""Do two revisions train alike, bit for bit? The demo's stage 2 with each one's own code and recipe, step by step.

    python tests/same_numbers.py main            the working tree against a revision
    python tests/same_numbers.py v1 v2           two revisions
    python tests/same_numbers.py main --only masked.one_process
    python tests/same_numbers.py main --after-flags=--new-name --renamed old_column=new_column

Data and stage 1 come from the first revision. From there both train 20 steps under several layouts, twice: as the
recipe says, whose masks have hardly begun by then, and with masks, teacher and centre busy from early on. Every column
of metrics.jsonl is compared but those that a clock decides. Exit status: 0 where all numbers are equal, else 1.
"""

import argparse
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
STEPS = 20
STAGE_1 = "--train-iters 20 --lr-warmup-iters 5"
STAGE_2 = f"--pretrained-checkpoint stage1 --exit-interval {STEPS} --log-interval 1"  # the recipe's schedules
MASKED = (
    "--mask-strategy constant --train-iters 40 --centering"  # from step 6; the teacher moves in every step
)

# Name -> (ranks, flags). The recipe's six rows a step are one micro-batch where nothing else is said.
LAYOUTS = {
    "one_process": (1, ""),
    "tp2_sp": (2, "--tensor-model-parallel-size 2 --sequence-parallel"),
    "pp2": (2, "--pipeline-model-parallel-size 2 --micro-batch-size 2"),
    "dp2_distributed": (2, "--use-distributed-optimizer --micro-batch-size 3"),
}
RUNS = [f"{kind}.{layout}" for kind in ("recipe", "masked") for layout in LAYOUTS]
CLOCK = re.compile(r"time_.*|.*_seconds?|tflops.*|mfu|hfu")
WHERE = (
    "import importlib.util as i; print(*(i.find_spec(p).origin for p in ('laver_mcore', 'laver_kernels')))"
)
Rows = list[dict[str, Any]]


@dataclass(kw_only=True)
class Comparison:
    """What two runs have in common."""

    steps: int
    metrics: list[str]
    before_only: list[str]
    after_only: list[str]
    numbers: int = 0
    """Compared; nulls are none."""
    different: list[str] = field(default_factory=list)
    """A line for each."""
    largest: float = 0.0
    """Relative difference."""


def git(*arguments: str) -> bytes:
    return subprocess.run(
        ("git", "-C", str(REPOSITORY), *arguments), check=True, stdout=subprocess.PIPE
    ).stdout


def extract(revision: str | None, tree: Path) -> str:
    """Write the files of a revision, or of the working tree as it is now; returns what they are called."""
    tree.mkdir()
    if revision is not None:
        commit = git("rev-parse", "--short", f"{revision}^{{commit}}").decode().strip()
        subprocess.run(("tar", "-x", "-C", str(tree)), input=git("archive", commit), check=True)
        return f"{revision} ({commit})"
    for name in git("ls-files", "-z", "--cached", "--others", "--exclude-standard").decode().split("\0"):
        if (REPOSITORY / name).is_file():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(REPOSITORY / name, tree / name)
    return "the working tree"


def python(tree: Path, command: Sequence[str], timeout: float) -> str:
    """`python command...` with the code of `tree`, in the folder around it; leaves if that fails."""
    path = os.pathsep.join([str(tree), str(tree / "kernels")])
    variables = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path, "TORCH_CPP_LOG_LEVEL": "ERROR"}
    variables.pop("TRITON_INTERPRET", None)
    log = tree.with_suffix(".log")
    with log.open("w") as out:
        process = subprocess.Popen(
            (sys.executable, *command),
            cwd=tree.parent,
            env=variables,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait(timeout)
        except BaseException:  # torchrun's ranks are in its session
            os.killpg(process.pid, signal.SIGKILL)
            raise
    output = log.read_text(errors="replace")
    if code:
        sys.exit(f"{output[-8000:]}\nexit status {code}: {shlex.join(command)}")
    return output


def train(tree: Path, stage: int, name: str, flags: str, timeout: float, ranks: int = 1) -> Rows:
    """Metrics of one run of a stage of the demo, saved as `name` beside `tree`."""
    start = time.monotonic()
    launcher = f"-m torch.distributed.run --standalone --nproc-per-node {ranks}" if ranks > 1 else ""
    recipe = tree / "examples" / "demo" / f"stage{stage}.yaml"
    command = f"{launcher} {tree}/pretrain_laver.py --config {recipe} --save {name} --no-tensorboard {flags}"
    python(tree, shlex.split(command), timeout)
    print(f"{time.monotonic() - start:6.0f} s  {name}", flush=True)
    lines = (tree.parent / name / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def same(a: float | None, b: float | None) -> bool:
    """Every bit, the sign of 0 and NaN included; 0 and 0.0 are the same."""
    return a is b if a is None or b is None else float(a).hex() == float(b).hex()


def relative_difference(a: float | None, b: float | None) -> float:
    if a is None or b is None or not (math.isfinite(a) and math.isfinite(b)):
        return math.inf
    return abs(a - b) / max(abs(a), abs(b), sys.float_info.min)


def compare(before: Rows, after: Rows, renamed: dict[str, str]) -> Comparison:
    """Both runs' metrics, those of `before` under the names that `after` gives them."""
    for rows in (before, after):
        if [row["iteration"] for row in rows] != list(range(1, STEPS + 1)):
            sys.exit(f"not the steps 1 to {STEPS}: {[row['iteration'] for row in rows]}")
    before = [{renamed.get(name, name): value for name, value in row.items()} for row in before]
    ours, theirs = ({n for row in rows for n in row if not CLOCK.fullmatch(n)} for rows in (before, after))
    found = Comparison(
        steps=len(before),
        metrics=sorted((ours & theirs) - {"iteration"}),
        before_only=sorted(ours - theirs),
        after_only=sorted(theirs - ours),
    )
    for row, other in zip(before, after, strict=True):
        for name in found.metrics:
            a, b = row.get(name), other.get(name)
            found.numbers += a is not None
            if not same(a, b):
                found.different.append(f"step {row['iteration']}: {name} {a!r} -> {b!r}")
                found.largest = max(found.largest, relative_difference(a, b))
    return found


def table(found: dict[str, Comparison]) -> str:
    """A line for each run, then what differs and what only one side has."""
    lines = [
        f"{'run':24} {'steps':>6} {'metrics':>8} {'numbers':>8} {'differ':>7}  largest relative difference"
    ]
    for name, c in found.items():
        counts = f"{c.steps:6} {len(c.metrics):8} {c.numbers:8} {len(c.different):7}"
        lines.append(f"{name:24} {counts}  {c.largest:.1e}")
    for name, c in found.items():
        lines += [f"{name}: {line}" for line in c.different[:8]]
        for side, columns in (("before", c.before_only), ("after", c.after_only)):
            lines += [f"{name}: {column} is there {side} only" for column in columns]
    names = sorted({name for c in found.values() for name in c.metrics})
    return "\n".join([*lines, f"compared: {', '.join(names)}"])


def run(args: argparse.Namespace, folder: Path) -> dict[str, Comparison]:
    """Everything in `folder`, where the recipes find data/demo."""
    trees = {side: folder / f"code_{side}" for side in ("before", "after")}
    for side, tree in trees.items():
        print(f"{side}: {extract(getattr(args, side), tree)}", flush=True)
        where = python(tree, ["-c", WHERE], args.timeout).split()
        assert all(Path(path).is_relative_to(tree) for path in where), where
    first = trees["before"]
    python(first, [str(first / "tools" / "prepare_demo.py"), "--output", "data/demo"], args.timeout)
    train(first, 1, "stage1", f"{STAGE_1} {args.before_flags}", args.timeout)
    found, renamed = {}, dict(pair.split("=") for pair in args.renamed)
    for name in filter(re.compile(args.only).search, RUNS):
        kind, layout = name.split(".")
        ranks, flags = LAYOUTS[layout]
        rows = {}
        for side, tree in trees.items():
            more = getattr(args, f"{side}_masked") if kind == "masked" else ""
            all_flags = f"{STAGE_2} {flags} {more} {getattr(args, f'{side}_flags')}"
            rows[side] = train(tree, 2, f"{name}.{side}", all_flags, args.timeout, ranks)
        found[name] = compare(rows["before"], rows["after"], renamed)
    return found


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("before", help="revision")
    add("after", nargs="?", help="revision (default: the working tree, as it is at the start)")
    for side in ("before", "after"):
        add(f"--{side}-flags", default="", metavar="FLAGS", help=f"further flags of every run {side}")
        add(f"--{side}-masked", default=MASKED, metavar="FLAGS", help=f"how {side} spells: {MASKED}")
    add("--renamed", nargs="+", default=[], metavar="OLD=NEW", help="columns that have got another name")
    add("--only", default="", metavar="REGEX", help=f"some of the runs: {', '.join(RUNS)}")
    add("--timeout", type=float, default=900.0, help="seconds that a run may take")
    args, start = parser.parse_args(argv), time.monotonic()
    with tempfile.TemporaryDirectory(prefix="same-numbers-") as folder:
        found = run(args, Path(folder).resolve())
    print(f"\n{table(found)}\n{time.monotonic() - start:.0f} s")
    # Columns may come with new features, but none may go.
    return int(not found or any(c.different or c.before_only for c in found.values()))


if __name__ == "__main__":
    sys.exit(main())
