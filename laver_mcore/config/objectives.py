"""Objectives by name, and what has to be known of one without importing it."""

import functools
from dataclasses import dataclass
from importlib.metadata import entry_points

from laver_mcore.config.errors import ConfigError, nearest
from laver_mcore.config.schema import Config

ENTRY_POINTS = "laver_mcore.objectives"
"""Group under which an installed package registers objectives of its own: name = "module:Class"."""


@dataclass(frozen=True, kw_only=True)
class ObjectiveSpec:
    """Where an objective's class is, and what it makes of the model."""

    path: str
    """`module:Class`."""
    reconstructs: bool = False
    """Whether visual tokens also go through the decoder by themselves, masked, against a teacher that a vision head
    reads as well; accounting and planning count these rows."""


BUILT_IN = {
    "lm": ObjectiveSpec(path="laver_mcore.objectives.objective:LanguageModel"),
    "laver": ObjectiveSpec(path="laver_mcore.objectives.laver:Laver", reconstructs=True),
}


@functools.cache  # installed packages are looked through once, not in every step
def objective_spec(name: str) -> ObjectiveSpec:
    """The objective of this name, built in or installed; `ConfigError` names the nearest one."""
    if name in BUILT_IN:
        return BUILT_IN[name]
    installed = {point.name: point.value for point in entry_points(group=ENTRY_POINTS)}
    if name in installed:
        return ObjectiveSpec(path=installed[name])
    known = [*BUILT_IN, *installed]
    raise ConfigError(
        f"objective={name!r} is not known; did you mean {nearest(name, known)!r}? ({', '.join(known)})"
    )


def reconstructs(config: Config) -> bool:
    """Whether the recipe's objective sends visual tokens through the decoder once more, against a teacher."""
    return objective_spec(config.train.objective).reconstructs
