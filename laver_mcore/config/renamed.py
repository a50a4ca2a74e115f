"""Keys of older recipes: taken where they are now, with one line that says so."""

import os
import sys
from pathlib import Path
from typing import Any

Recipe = dict[str, Any]

_MOVED = {
    ("laver", "mixed_attention"): ("attention", "mixed_attention"),
    ("laver", "rope_2d"): ("attention", "rope_2d"),
    ("laver", "laver"): ("train", "objective"),
}
FLAGS = {"laver": "--objective laver", "no_laver": "--objective lm"}
"""Older flag -> today's."""


def with_todays_keys(raw: Recipe, path: Path) -> Recipe:
    """The recipe with every older key at its new place; what has both keeps the new one. Says so on rank 0."""
    recipe = {section: dict(v) if isinstance(v, dict) else v for section, v in raw.items()}
    for (section, key), (new_section, new_key) in _MOVED.items():
        values = recipe.get(section)
        if not isinstance(values, dict) or key not in values:
            continue
        value = values.pop(key)
        if (section, key) == ("laver", "laver"):
            value = "laver" if value else "lm"
        target = recipe.get(new_section) or {}
        recipe[new_section] = {new_key: value, **target} if isinstance(target, dict) else target
        if os.environ.get("RANK", "0") == "0":
            print(f"{path}: {section}.{key} is now {new_section}.{new_key}: {value}", file=sys.stderr)
    return recipe
