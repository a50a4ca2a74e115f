"""Keys of older recipes: taken where they are now, with one line that says so."""

import os
import sys
from pathlib import Path
from typing import Any

Recipe = dict[str, Any]

_MOVED = {
    ("laver", "mixed_attention"): ("attention", "mixed_attention"),
    ("laver", "rope_2d"): ("attention", "rope_2d"),
}
_OBJECTIVES = {("laver", "laver"): {True: "laver", False: "lm"}, ("train", "objective"): {}}
"""Older places of the objective's name, and what was written there instead of it."""
FLAGS = {"laver": "--objective laver", "no_laver": "--objective lm"}
"""Older flag -> today's."""


def with_todays_keys(raw: Recipe, path: Path) -> Recipe:
    """The recipe with every older key at its new place; what has both keeps the new one. Says so on rank 0."""
    recipe = {section: dict(v) if isinstance(v, dict) else v for section, v in raw.items()}
    for (section, key), names in _OBJECTIVES.items():
        value = _taken(recipe, section, key)
        if value is not None:
            recipe.setdefault("objective", names.get(value, value))
            _say(f"{path}: {section}.{key} is now objective: {names.get(value, value)}")
    for (section, key), (new_section, new_key) in _MOVED.items():
        value = _taken(recipe, section, key)
        if value is not None:
            target = recipe.get(new_section) or {}
            recipe[new_section] = {new_key: value, **target} if isinstance(target, dict) else target
            _say(f"{path}: {section}.{key} is now {new_section}.{new_key}: {value}")
    _keep_contiguous_bands(recipe, path)
    return recipe


def _keep_contiguous_bands(recipe: Recipe, path: Path) -> None:
    """What names its rotary bands but no split, as every run's config.yaml did, is from when there was only one."""
    model = recipe.get("model")
    if isinstance(model, dict) and model.get("mrope_section") is not None and "mrope_split" not in model:
        recipe["model"] = {**model, "mrope_split": "contiguous"}
        _say(f"{path}: mrope_section without mrope_split is read as mrope_split: contiguous, as it was")


def _taken(recipe: Recipe, section: str, key: str) -> Any:
    values = recipe.get(section)
    return values.pop(key, None) if isinstance(values, dict) else None


def _say(line: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        print(line, file=sys.stderr)
