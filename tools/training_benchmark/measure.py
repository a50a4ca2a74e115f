"""Runs the arms, each in a process of its own: first steps, equality, then rounds of timed steps in turn."""

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tools.training_benchmark.equality import Agreement, agreements
from tools.training_benchmark.setting import Arm, Setting

ROOT = Path(__file__).resolve().parents[2]
MOVES = 3
"""Steps in which the teacher moves, timed apart: it does so in one of 125 under stage 2's recipe."""


class ArmError(RuntimeError):
    """An arm's process died; the message holds the last it said."""


class ArmProcess:
    """One arm, waiting for commands (`worker.py`)."""

    def __init__(self, arm: Arm, setting: Setting, folder: Path) -> None:
        self._arm = arm
        self._log = (folder / f"{arm}.log").open("w+")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tools.training_benchmark.worker", arm],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")},
        )
        self._tell("build", setting=asdict(setting))

    def wait_until_built(self) -> None:
        """Until then other processes may be started, which takes as long."""
        self._hear("build")

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """The answer to one command; `ArmError` if the process died over it."""
        self._tell(do, **arguments)
        return self._hear(do)

    def _tell(self, do: str, **arguments: Any) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # `_hear` says why it died
            self._process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
            self._process.stdin.flush()

    def _hear(self, do: str) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            self._log.seek(0)
            said = self._log.read()[-4000:]
            raise ArmError(f"{self._arm} died with exit status {self._process.returncode} at {do!r}:\n{said}")
        return json.loads(line)

    def close(self) -> None:
        """End the process and wait for it, so that its memory is free."""
        with contextlib.suppress(BrokenPipeError):
            self._process.communicate()
        self._log.close()


@dataclass(kw_only=True)
class Measured:
    """What one arm's process found."""

    rounds: list[list[float]] = field(default_factory=list)
    """Seconds of every timed step, round by round."""
    teacher_moves: list[float] = field(default_factory=list)
    """Seconds of steps in which the teacher moves as well."""
    clock: str = "wall"
    """"wall", or "process" where only what this process computed was counted."""
    peak_bytes: int = 0
    counted_flops: float | None = None
    """FLOPs of one step as torch counts them; None on a GPU."""
    profile: str = ""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Which arms, and how often."""

    arms: tuple[Arm, ...]
    warmup: int
    steps: int
    rounds: int
    one_at_a_time: bool
    profile: int


Say = Callable[[str], None]


@contextlib.contextmanager
def running(arm: Arm, setting: Setting, folder: Path) -> Iterator[ArmProcess]:
    process = ArmProcess(arm, setting, folder)
    try:
        yield process
    finally:
        process.close()


def measure(
    setting: Setting, plan: Plan, folder: Path, say: Say, red: Callable[[list[Agreement]], None]
) -> tuple[list[Agreement], dict[Arm, Measured]]:
    """Compare the first steps, hand the agreements to `red` (which may raise), then time; logs go to `folder`.

    With `one_at_a_time` arms are built twice, for comparing and for timing, and never share the device's memory.
    """
    with contextlib.ExitStack() as stack:
        if plan.one_at_a_time:
            losses = {}
            for arm in plan.arms:
                with running(arm, setting, folder) as process:
                    process.wait_until_built()
                    losses[arm] = process.ask("losses")
                    say(f"{arm}: first step taken")
            found = agreements(losses, setting.bf16)
            red(found)
            measured: dict[Arm, Measured] = {}
            for arm in plan.arms:
                with running(arm, setting, folder) as process:
                    process.wait_until_built()
                    process.ask("losses")
                    measured |= _time({arm: process}, plan, say)
            return found, measured
        processes = {arm: stack.enter_context(running(arm, setting, folder)) for arm in plan.arms}
        for process in processes.values():
            process.wait_until_built()
        losses = {arm: process.ask("losses") for arm, process in processes.items()}
        found = agreements(losses, setting.bf16)
        red(found)
        return found, _time(processes, plan, say)


def _time(processes: dict[Arm, ArmProcess], plan: Plan, say: Say) -> dict[Arm, Measured]:
    """Warm up, then rounds of steps in turn, the order turning round as well; then what is asked once."""
    measured = {arm: Measured() for arm in processes}
    for process in processes.values():
        process.ask("steps", count=plan.warmup)
    order: Sequence[Arm] = list(processes)
    for number in range(plan.rounds):
        for arm in order:
            answer = processes[arm].ask("steps", count=plan.steps)
            measured[arm].rounds.append(answer["seconds"])
            measured[arm].clock = answer["clock"]
        order = list(reversed(order))
        say(f"round {number + 1} of {plan.rounds}: {', '.join(processes)}")
    for arm, process in processes.items():
        measured[arm].peak_bytes = process.ask("memory")["peak_bytes"]
        if arm != "lm":
            moves = process.ask("steps", count=MOVES, move_teacher=True)["seconds"]
            measured[arm].teacher_moves = moves
        measured[arm].counted_flops = process.ask("count")["flops"]
        if plan.profile:
            measured[arm].profile = process.ask("profile", rows=plan.profile)["table"]
    return measured
