"""What an ablation trains: a committed YAML file -> tasks, arms and cells, in the order in which they run."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from laver_mcore.config.errors import ConfigError

ALIGN = "align"
"""Name of the cell that others of its task, attention and seed start from."""
RESULT = "cell.json"
"""What a finished cell has in its folder."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """Data to prepare, and flags of the two stages on it."""

    prepare: tuple[str, ...] = ()
    """Flags of tools/prepare_demo.py."""
    align: tuple[str, ...] = ()
    train: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One method: how it is called, its attention, its own flags, and the arms it is compared with."""

    title: str
    attention: str
    flags: tuple[str, ...] = ()
    against: tuple[str, ...] = ()
    tasks: tuple[str, ...] = ()
    """Tasks it is trained on; all where none is named."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """The whole file."""

    align: str
    """Recipe that all cells start from."""
    train: str
    """Recipe that is compared."""
    seeds: tuple[int, ...]
    tasks: dict[str, Task]
    attention: dict[str, tuple[str, ...]]
    """Flags of both stages, by name."""
    arms: dict[str, Arm]
    watch_interval: int = 20
    """Iterations between two looks at the states of held-out pages."""
    watch_pages: int = 16
    answer_pages: int = 240
    """Held-out pages that are read out at the end."""
    common: tuple[str, ...] = field(default=())
    """Flags of every cell."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One run: an arm, or `ALIGN` of an attention, on a task, with a seed."""

    task: str
    arm: str
    attention: str
    seed: int

    @property
    def name(self) -> str:
        """Folder of the run, below the output's."""
        last = f"{ALIGN}_{self.attention}" if self.arm == ALIGN else self.arm
        return f"{self.task}/seed{self.seed}/{last}"

    @property
    def start(self) -> "Cell | None":
        """The cell whose weights this one starts from."""
        if self.arm == ALIGN:
            return None
        return Cell(task=self.task, arm=ALIGN, attention=self.attention, seed=self.seed)


def load(path: Path, *, seeds: Sequence[int] | None = None) -> Setting:
    """Read a setting, with other `seeds` if given; ConfigError for what does not fit together."""
    try:
        found: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
        tasks = {name: Task(**_tuples(values or {})) for name, values in found.pop("tasks").items()}
        arms = {name: Arm(**_tuples(values)) for name, values in found.pop("arms").items()}
        attention = {name: tuple(map(str, flags)) for name, flags in found.pop("attention").items()}
        setting = Setting(tasks=tasks, arms=arms, attention=attention, **_tuples(found))
    except (OSError, yaml.YAMLError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path} is no setting of an ablation ({error})") from None
    for name, arm in arms.items():
        for kind, wanted, known in (
            ("attention", (arm.attention,), attention),
            ("against", arm.against, arms),
            ("tasks", arm.tasks, tasks),
        ):
            for item in wanted:
                if item not in known:
                    raise ConfigError(
                        f"{path}: {kind} of {name} names {item!r}; it may be {', '.join(known)}"
                    )
    return replace(setting, seeds=tuple(seeds)) if seeds else setting


def _tuples(values: dict[str, Any]) -> dict[str, Any]:
    """Lists as tuples; flags are text, seeds are numbers."""
    return {
        key: tuple(item if key == "seeds" else str(item) for item in value)
        if isinstance(value, list)
        else value
        for key, value in values.items()
    }


def cells_of(setting: Setting, *, tasks: Sequence[str] = (), arms: Sequence[str] = ()) -> list[Cell]:
    """All cells, or those of some tasks and arms; whole seeds first, each behind the one that it starts from."""
    for kind, wanted, known in (("task", tasks, setting.tasks), ("arm", arms, setting.arms)):
        for name in wanted:
            if name not in known:
                raise ConfigError(f"there is no {kind} {name!r}; it may be {', '.join(known)}")
    cells: dict[str, Cell] = {}
    for seed in setting.seeds:
        for task in tasks or setting.tasks:
            for name in arms or setting.arms:
                arm = setting.arms[name]
                if arm.tasks and task not in arm.tasks:
                    continue
                cell = Cell(task=task, arm=name, attention=arm.attention, seed=seed)
                assert cell.start is not None
                for each in (cell.start, cell):
                    cells.setdefault(each.name, each)
    return list(cells.values())
