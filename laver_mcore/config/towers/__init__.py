"""Vision towers by name: the built-in ones, and those that an installed package registers."""

import functools
from collections.abc import Mapping
from importlib.metadata import entry_points

from laver_mcore.config.errors import ConfigError, nearest
from laver_mcore.config.towers.fixed import CLIP, DINOV2, SIGLIP
from laver_mcore.config.towers.native import AIMV2, QWEN2_VL, QWEN25_VL
from laver_mcore.config.towers.spec import TowerSpec

ENTRY_POINTS = "laver_mcore.towers"
"""Group under which an installed package registers towers of its own: name = "module:TOWER"."""

BUILT_IN = {tower.name: tower for tower in (SIGLIP, CLIP, DINOV2, AIMV2, QWEN2_VL, QWEN25_VL)}
NONE, ENCODER_FREE = "none", "encoder-free"
"""Visual paths without a tower: text alone, and patches that the connector embeds."""


@functools.cache
def known_towers() -> Mapping[str, TowerSpec]:
    """Every tower, built in or installed."""
    installed = {point.name: point.load() for point in entry_points(group=ENTRY_POINTS)}
    return installed | BUILT_IN


def tower_named(name: str) -> TowerSpec:
    """The tower called `name`; `ConfigError` names the nearest visual path."""
    known = known_towers()
    if name not in known:
        paths = [NONE, ENCODER_FREE, *known]
        raise ConfigError(
            f"vision={name!r} is not known; did you mean {nearest(name, paths)!r}? ({', '.join(paths)})"
        )
    return known[name]


def towers_of_type(model_type: object) -> list[TowerSpec]:
    """The towers whose config.json has this `model_type`."""
    return [tower for tower in known_towers().values() if model_type in tower.model_types]
