"""All layouts of a recipe on a cluster, ranked by predicted step time."""

from collections import Counter
from dataclasses import dataclass

from laver_mcore.config.schema import Config
from laver_mcore.plan.layouts import candidates, refusal
from laver_mcore.plan.predict import Prediction, predict
from laver_mcore.plan.setting import Setting


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Feasible layouts, the fastest first, and how many were left out for which reason."""

    feasible: tuple[Prediction, ...]
    refused: Counter[str]
    smallest: Prediction | None
    """The layout that needs least memory of those that were left out for it."""


def search(config: Config, setting: Setting) -> Plan:
    """Try every layout: those that the run itself would refuse and those that do not fit are counted, not ranked."""
    feasible: list[Prediction] = []
    refused: Counter[str] = Counter()
    smallest: Prediction | None = None
    for layout in candidates(config, setting.num_gpus):
        applied = layout.apply(config)
        why = refusal(applied, setting.num_gpus)
        if why is not None:
            refused[_kind(why)] += 1
            continue
        found = predict(applied, layout, setting)
        if found.fits(setting.gpu):
            feasible.append(found)
            continue
        refused["does not fit into memory"] += 1
        if smallest is None or found.peak_memory < smallest.peak_memory:
            smallest = found
    feasible.sort(key=lambda found: (found.seconds, found.peak_memory))
    return Plan(feasible=tuple(feasible), refused=refused, smallest=smallest)


def _kind(refusal: str) -> str:
    """The refusal without its fix and without the numbers of the one layout."""
    said = refusal.split(";")[0].split(", got")[0]
    return " ".join(
        word.split("=")[0] if "=" in word else word for word in said.split() if not word[:1].isdigit()
    )
