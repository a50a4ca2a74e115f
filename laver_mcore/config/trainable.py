"""Name patterns of what trains, whatever the objective: `objective` stands for the parameters that it adds."""

import fnmatch
from collections.abc import Iterable

from laver_mcore.config.objectives import known_objectives, section_of
from laver_mcore.config.schema import Config

OWN = "objective"
ADAPTERS = (".lora_a", ".lora_b")
"""Ends of the names of LoRA's parameters."""
MODEL = ("*", "connector", "language_model", "vision_encoder")
"""Beginnings of patterns that are the model's in any case."""


def resolve_trainable(config: Config) -> tuple[str, ...]:
    """The patterns, with the objective's own names for `objective`.

    Patterns of what another objective would add are left out, and of a tower or connector that the visual path does
    without: a recipe keeps them when its objective or its visual path is changed.
    """
    vision = config.vision
    absent = [] if vision.tower is not None else ["vision_encoder"]
    absent += [] if vision.has_images else ["connector"]
    own = [weight.name for weight in config.objective.parameters(config)]
    found: list[str] = []
    for pattern in config.train.trainable:
        if pattern == OWN:
            found += own
        elif pattern.startswith(tuple(absent)):
            continue
        elif pattern.startswith(MODEL) or fnmatch.filter(own, pattern) or not _is_anothers(pattern, config):
            found.append(pattern)
    return tuple(found) or config.train.trainable


def trains(name: str, patterns: Iterable[str], lora: bool) -> bool:
    """Whether the parameter called `name` trains; with LoRA, of the decoder its adapters alone."""
    if lora and name.startswith("language_model.") and not name.endswith(ADAPTERS):
        return False
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _is_anothers(pattern: str, config: Config) -> bool:
    others = (name for name in known_objectives() if name != config.objective.name)
    return any(
        fnmatch.fnmatchcase(weight.name, pattern)
        for name in others
        for weight in section_of(name)().parameters(config)
    )
