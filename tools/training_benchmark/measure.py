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
    """An arm's process died; the message is the line in which it said why."""


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
            said = self._log.read()
            print(said[-4000:], file=sys.stderr, flush=True)
            raise ArmError(f"at {do!r}, exit status {self._process.returncode}: {reason(said)}")
        return json.loads(line)

    def close(self) -> None:
        """End the process and wait for it, so that its memory is free."""
        with contextlib.suppress(BrokenPipeError):
            self._process.communicate()
        self._log.close()


def reason(log: str) -> str:
    """The last line of a dead process's log that names an error, or the last one."""
    lines = [line.strip() for line in log.splitlines() if line.strip()] or ["it said nothing"]
    errors = [line for line in lines if "Error:" in line]
    return (errors or lines)[-1]


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


@dataclass(kw_only=True)
class Results:
    """What is known so far; arms that died stand in `left_out` with the reason, and in nothing else."""

    measured: dict[Arm, Measured] = field(default_factory=dict)
    agreed: list[Agreement] = field(default_factory=list)
    left_out: dict[Arm, str] = field(default_factory=dict)


Keep = Callable[[Results], None]
"""Told whenever there is more, so that a run that is cut short has not been for nothing."""


@contextlib.contextmanager
def running(arm: Arm, setting: Setting, folder: Path) -> Iterator[ArmProcess]:
    process = ArmProcess(arm, setting, folder)
    try:
        yield process
    finally:
        process.close()


class _Measurement:
    """Asks the arms in turn; one that dies is left out, with a line that says so, and the others go on."""

    def __init__(self, setting: Setting, plan: Plan, say: Say, refuse: Callable, keep: Keep) -> None:
        self._setting, self._plan, self._say, self._refuse, self._keep = setting, plan, say, refuse, keep
        self._losses: dict[Arm, dict[str, Any]] = {}
        self.results = Results()

    def run(self, processes: dict[Arm, ArmProcess]) -> None:
        """First steps, whose losses must agree with those of all arms before, then rounds of timed ones."""
        for arm, process in processes.items():
            with self._or_left_out(arm):
                process.wait_until_built()
                self._losses[arm] = process.ask("losses")
                self._say(f"{arm}: first step taken")
        self.results.agreed = agreements(self._losses, self._setting.bf16)
        self._refuse(self.results.agreed)
        alive = {arm: process for arm, process in processes.items() if arm in self._losses}
        if alive:
            self._time(alive)

    def _time(self, processes: dict[Arm, ArmProcess]) -> None:
        """Warm up, then rounds of steps in turn, the order turning round as well; then what is asked once."""
        found = {arm: Measured() for arm in processes}
        for arm, process in processes.items():
            with self._or_left_out(arm):
                process.ask("steps", count=self._plan.warmup)
        order: Sequence[Arm] = list(processes)
        for number in range(self._plan.rounds):
            for arm in order:
                if arm in self._losses:
                    with self._or_left_out(arm):
                        answer = processes[arm].ask("steps", count=self._plan.steps)
                        found[arm].rounds.append(answer["seconds"])
                        found[arm].clock = answer["clock"]
                        found[arm].peak_bytes = processes[arm].ask("memory")["peak_bytes"]
            order = list(reversed(order))
            self._say(f"round {number + 1} of {self._plan.rounds}: {', '.join(processes)}")
            self._tell(found)
        for arm, process in processes.items():
            if arm in self._losses:
                with self._or_left_out(arm):
                    self._ask_once(arm, process, found[arm])
        self._tell(found)

    def _ask_once(self, arm: Arm, process: ArmProcess, found: Measured) -> None:
        if arm != "lm":
            found.teacher_moves = process.ask("steps", count=MOVES, move_teacher=True)["seconds"]
        found.counted_flops = process.ask("count")["flops"]
        if self._plan.profile:
            found.profile = process.ask("profile", rows=self._plan.profile)["table"]

    def _tell(self, found: dict[Arm, Measured]) -> None:
        self.results.measured |= {arm: each for arm, each in found.items() if arm in self._losses}
        self._keep(self.results)

    @contextlib.contextmanager
    def _or_left_out(self, arm: Arm) -> Iterator[None]:
        try:
            yield
        except ArmError as error:
            self._losses.pop(arm, None)
            self.results.measured.pop(arm, None)
            self.results.left_out[arm] = str(error)
            self._say(f"{arm}: left out; it died {error}")


def measure(
    setting: Setting,
    plan: Plan,
    folder: Path,
    say: Say,
    refuse: Callable[[list[Agreement]], None],
    keep: Keep,
) -> Results:
    """Compare the first steps, hand the agreements to `refuse` (which may raise), then time; logs go to `folder`.

    With `one_at_a_time` one arm after the other is built, compared with those before, timed and ended: they never
    share the device's memory, and do not take turns.
    """
    work = _Measurement(setting, plan, say, refuse, keep)
    if plan.one_at_a_time:
        for arm in plan.arms:
            with running(arm, setting, folder) as process:
                work.run({arm: process})
        return work.results
    with contextlib.ExitStack() as stack:
        work.run({arm: stack.enter_context(running(arm, setting, folder)) for arm in plan.arms})
    return work.results
