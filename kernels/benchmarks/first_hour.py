"""The first hour on a GPU, one command: correct, how fast the machine, which tiles, how fast we are, as predicted?

    python kernels/benchmarks/first_hour.py --minutes 55        # make gpu-first-hour
    python kernels/benchmarks/first_hour.py --rehearse          # the same steps on a CPU at toy size

Every step is a command of its own with its share of the minutes; what is done is written down, and a second call goes
on where the first was stopped (`--again` starts over). A step that is red stops what depends on it. Everything lands in
one folder: results, plots, tuned `configs.py`, the log of every step and `summary.txt`.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
REHEARSED = ("--check", "--only", "67M elements")  # of run.py: without a GPU it checks, and times nothing


@dataclass(frozen=True, kw_only=True)
class Step:
    """A command under a name; `share` of the minutes is the most that it may take."""

    name: str
    command: tuple[str, ...]
    share: float
    must_pass: bool = False  # nothing after it runs while it is red


def steps(folder: Path, minutes: float, rehearse: bool) -> list[Step]:
    """What the hour consists of, in order."""
    python, results = sys.executable, str(folder / "results")
    run = (python, str(HERE / "run.py"), "--output", results, "--resume")
    tests = ("tests/gpu/test_gpu_kernels.py", "tests/kernels")
    if rehearse:
        tests = ("tests/kernels/test_kernel_intervals.py",)
        short = quick = rest = (*run, *REHEARSED)
    else:
        short = (*run, "--quick", "--baselines", "none", "--minutes", f"{0.1 * minutes:.1f}")
        quick = (*run, "--quick", "--minutes", f"{0.3 * minutes:.1f}")
        rest = (*run, "--baselines", "none", "--minutes", f"{0.1 * minutes:.1f}")
    return [
        Step(name="correctness", command=(python, "-m", "pytest", "-q", *tests), share=0.2, must_pass=True),
        Step(name="ours", command=short, share=0.12),
        Step(name="tune", command=(python, str(HERE / "tune.py"), "--write"), share=0.2),
        # With other tiles the sources differ from what was timed: the rows carry a name of their own.
        Step(name="baselines", command=(*quick, "--commit", "tuned"), share=0.33),
        Step(name="every shape", command=(*rest, "--commit", "tuned"), share=0.12),
        Step(
            name="host time",
            command=(python, str(HERE / "host_time.py"), "--repeats", "20" if rehearse else "300"),
            share=0.03,
        ),
    ]


def run_step(step: Step, folder: Path, minutes: float) -> dict:
    """Runs a step with its output in a log of its own; what came of it."""
    log = folder / f"{step.name.replace(' ', '_')}.log"
    begin = time.monotonic()
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    with log.open("w", encoding="utf-8") as output:
        try:
            code = subprocess.run(
                step.command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, env=environment,
                timeout=60 * minutes, check=False,
            ).returncode  # fmt: skip
            word = "ok" if code == 0 else f"failed with status {code}"
        except subprocess.TimeoutExpired:
            word = f"stopped after {minutes:.1f} minutes"
    return {"outcome": word, "seconds": round(time.monotonic() - begin, 1), "log": log.name}


def compare(rows: list[dict], predicted: dict[str, float]) -> list[str]:
    """Measured rate against the predicted one, TF/s, for every case that has a prediction.

    `predicted` are shares of the rate of a bare matrix product, as measured in the same run.
    """
    lines = []
    for row in rows:
        share = predicted.get(f"{row['operation']}, {row['case']}, {row['direction']}")
        peak = row.get("peaks", {}).get("teraflops")
        if share is not None and peak is not None:
            want = share * peak
            ratio = row["rate"] / want
            lines.append(
                f"{row['case']} {row['direction']}: {row['rate']:.0f} measured, {want:.0f} predicted, {ratio:.2f}"
            )
    return lines


def read_predictions(path: Path, arch: str | None) -> dict[str, float]:
    """`{"operation, case, direction": share of the peak}` for an architecture, as `predict.py` writes it."""
    return json.loads(path.read_text(encoding="utf-8")).get(arch, {}) if path.is_file() else {}


def architecture() -> str | None:
    """This GPU's own architecture; None without one."""
    import torch  # seconds, and of use here alone

    if not torch.cuda.is_available():
        return None
    return "sm_{}{}".format(*torch.cuda.get_device_capability())


def summary(done: dict[str, dict], folder: Path) -> str:
    """What a reader wants first: outcomes, peaks, and measured against predicted."""
    lines = [
        f"{name:<14}{each['outcome']}, {each['seconds']:.0f} s ({each['log']})" for name, each in done.items()
    ]
    for log in sorted(folder.glob("*.log")):
        lines += re.findall(
            r"^measured here: .*$", log.read_text(encoding="utf-8", errors="replace"), re.MULTILINE
        )
    rows = [row for path in (folder / "results").glob("*.json") for row in json.loads(path.read_text())]
    lines.append(f"{len(rows)} rows of results")
    compared = compare(rows, read_predictions(HERE / "predictions.json", architecture()))
    lines += compared or [
        "nothing measured, or no prediction for this GPU (kernels/benchmarks/predictions.json)"
    ]
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=55.0, help="for all steps together")
    parser.add_argument(
        "--output", type=Path, default=HERE / "results" / "first_hour", help="folder of all results"
    )
    parser.add_argument("--rehearse", action="store_true", help="the same steps at toy size, on a CPU too")
    parser.add_argument("--again", action="store_true", help="do again what was done before")
    arguments = parser.parse_args(argv)
    folder = arguments.output
    folder.mkdir(parents=True, exist_ok=True)
    state = folder / "done.json"
    done = json.loads(state.read_text()) if state.is_file() and not arguments.again else {}
    begin = time.monotonic()
    red = False
    for step in steps(folder, arguments.minutes, arguments.rehearse):
        if done.get(step.name, {}).get("outcome") == "ok":
            print(f"{step.name}: done before", flush=True)
            continue
        left = arguments.minutes - (time.monotonic() - begin) / 60
        if left <= 0:
            print(f"{step.name}: no minutes left; call again")
            red = True
            break
        done[step.name] = run_step(
            step, folder, left if arguments.rehearse else min(left, step.share * arguments.minutes)
        )
        state.write_text(json.dumps(done, indent=1) + "\n")
        print(f"{step.name}: {done[step.name]['outcome']}", flush=True)
        is_red = done[step.name]["outcome"] != "ok"
        red = red or is_red
        if is_red and step.must_pass:
            print(f"nothing after {step.name} runs while it is red: {folder / done[step.name]['log']}")
            break
    text = summary(done, folder)
    (folder / "summary.txt").write_text(text)
    print(text, end="")
    return int(red)


if __name__ == "__main__":
    sys.exit(main())
