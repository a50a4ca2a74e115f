"""Objectives by name: `--objective laver`, or one that an installed package registers."""

import functools
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any

from laver_mcore.config.errors import ConfigError, nearest
from laver_mcore.config.schema import ObjectiveConfig

ENTRY_POINTS = "laver_mcore.objectives"
"""Group under which an installed package registers objectives of its own: name = "module:Class"."""

BUILT_IN = {
    "lm": "laver_mcore.objectives.objective:LanguageModel",
    "laver": "laver_mcore.objectives.laver:Laver",
    "victor": "laver_mcore.objectives.victor:Victor",
    "viral": "laver_mcore.objectives.viral:Viral",
}


@functools.cache
def known_objectives() -> dict[str, str]:
    """Name -> `module:Class` of every objective, built in or installed."""
    installed = {point.name: point.value for point in entry_points(group=ENTRY_POINTS)}
    return installed | BUILT_IN


@functools.cache
def load_objective(name: str) -> Any:
    """The class of the objective called `name`; `ConfigError` names the nearest one."""
    known = known_objectives()
    if name not in known:
        raise ConfigError(
            f"objective={name!r} is not known; did you mean {nearest(name, list(known))!r}? ({', '.join(known)})"
        )
    module, _, attribute = known[name].partition(":")
    return getattr(import_module(module), attribute)


def section_of(name: str) -> type[ObjectiveConfig]:
    """The settings' class of the objective called `name`, which its section of a recipe is read into."""
    if name == ObjectiveConfig.name:
        return ObjectiveConfig  # read without torch
    section: type[ObjectiveConfig] = load_objective(name).Settings
    if section.name != name:
        raise ConfigError(
            f"objective {name} has settings of {section.name!r}; its Settings need name = {name!r}"
        )
    return section
