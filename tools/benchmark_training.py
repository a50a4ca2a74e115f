"""Training end to end, three ways: the language model alone, LaVer, and LaVer's released recipe on transformers.

Same weights, same batches, same losses: the first steps of all arms must agree, or nothing is timed. Each arm runs in
a process of its own, steps in turn; times are medians, and every row says what the account of FLOPs expects.

    python tools/benchmark_training.py                                    # tiny, on a CPU: seconds
    python tools/benchmark_training.py --model qwen2.5-1.5b --recompute full
    python tools/benchmark_training.py --model qwen2.5-7b --num-layers 4 --one-at-a-time

See docs/benchmark.md.
"""

import dataclasses
import shlex
import sys
import tempfile
import warnings
from pathlib import Path

import tyro

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from tools.training_benchmark import setting as settings  # noqa: E402


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    """Measure training end to end."""

    setting: tyro.conf.OmitArgPrefixes[settings.Setting]
    arms: str = ",".join(settings.ARMS)
    """Which contenders, with commas: lm, laver, released."""
    warmup: int = 3
    """Untimed steps after the first."""
    steps: int = 5
    """Timed steps of each arm in a round."""
    rounds: int = 3
    """Rounds; the arms take turns in each."""
    one_at_a_time: bool = False
    """Never hold two arms in memory: build, compare and time one after the other."""
    time_anyway: bool = False
    """Time arms whose first steps differ as well; the report says by how much."""
    profile: int = 0
    """Also print so many rows of torch.profiler's table of each arm's step."""
    output: Path | None = None
    """JSON file to write; `tools/training_benchmark/results/<device>-<model>-<date>.json` where not given."""


class NotEqual(Exception):
    """The arms do not compute the same losses."""


def parse(argv: list[str]) -> Arguments:
    """The command line; the setting's defaults go with its model."""
    import torch

    model = "tiny"
    for word, following in zip(argv, [*argv[1:], ""], strict=True):
        if word.startswith("--model="):
            model = word.removeprefix("--model=")
        elif word == "--model":
            model = following
    default = Arguments(setting=settings.preset(model, torch.cuda.is_available()))
    return tyro.cli(Arguments, args=argv, default=default, description=__doc__)


def chosen_arms(text: str) -> tuple[settings.Arm, ...]:
    """Arms by name, in the table's order; ValueError for an unknown one."""
    names = text.split(",")
    unknown = [name for name in names if name not in settings.ARMS]
    if unknown:
        raise ValueError(f"arms={text!r}: {unknown[0]!r} is none; use {', '.join(settings.ARMS)}")
    return tuple(arm for arm in settings.ARMS if arm in names)


def run(arguments: Arguments, command: str) -> Path:
    """Measure and report; returns the JSON file.

    Raises `NotEqual` before unequal arms are timed, and `ArmError` for arms that died, after all else is written.
    """
    from tools.training_benchmark import report
    from tools.training_benchmark.account import account
    from tools.training_benchmark.equality import table
    from tools.training_benchmark.measure import ArmError, Plan, Results, measure

    setting = arguments.setting
    setting.check()
    plan = Plan(
        arms=chosen_arms(arguments.arms),
        warmup=arguments.warmup,
        steps=arguments.steps,
        rounds=arguments.rounds,
        one_at_a_time=arguments.one_at_a_time,
        profile=arguments.profile,
    )

    def refuse(found: list) -> None:
        print(table(found), flush=True)
        if not (all(each.holds for each in found) or arguments.time_anyway):
            raise NotEqual("the arms' first steps differ: nothing is timed")

    def keep(results: Results) -> None:
        report.keep(report.report(setting, where, command, results, accounts), output)

    where = report.machine()  # the commit as it is when the arms are started
    output = arguments.output or report.RESULTS / f"{report.file_stem(where, setting)}.json"
    with tempfile.TemporaryDirectory() as name:
        whole = settings.with_tower(setting, Path(name))
        accounts = {arm: account(arm, whole) for arm in plan.arms}
        results = measure(whole, plan, Path(name), lambda line: print(line, flush=True), refuse, keep)
    result = report.report(setting, where, command, results, accounts)
    print(f"\n{report.table(result)}")
    for arm, found in results.measured.items():
        if found.profile:
            print(f"\n{arm}\n{found.profile}")
    print("\n".join(f"wrote {path}" for path in report.write(result, output)))
    if results.left_out:
        raise ArmError("; ".join(f"{arm} died {why}" for arm, why in results.left_out.items()))
    return output


def main(argv: list[str]) -> int:
    """Exit status: 0, 1 where losses differ or an arm dies, 2 for bad input."""
    warnings.filterwarnings("ignore")
    from tools.training_benchmark.measure import ArmError

    try:
        run(parse(argv), shlex.join(["python", "tools/benchmark_training.py", *argv]))
    except (NotEqual, ArmError) as error:
        print(f"benchmark_training.py: {error}", file=sys.stderr)
        return 1
    except ValueError as error:
        print(f"benchmark_training.py: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
