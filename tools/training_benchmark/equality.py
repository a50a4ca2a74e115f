"""Equal losses first: the arms' first steps must agree before anything is timed."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from tools.training_benchmark.setting import Arm

TOLERANCES: dict[str, dict[str, float]] = {
    "fp32": {"lm": 1e-4, "mim": 1e-4, "gram": 1e-3, "grad_norm": 1e-3},
    # Eight bits of mantissa: the vision head's outputs err by up to a percent and are divided by 0.04. Seen on a CPU
    # with four layers and 729 visual tokens: 2e-6, 2e-3, 9e-5, 2e-3.
    "bf16": {"lm": 2e-3, "mim": 3e-2, "gram": 5e-2, "grad_norm": 5e-2},
}
"""Relative differences that are allowed; the Gram loss is a difference of nearly equal similarities."""


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """One quantity of the first step in two arms."""

    quantity: str
    arms: tuple[Arm, Arm]
    values: tuple[float, float]
    tolerance: float

    @property
    def difference(self) -> float:
        """Relative to the larger of the two."""
        first, second = self.values
        return abs(first - second) / max(abs(first), abs(second), 1e-12)

    @property
    def holds(self) -> bool:
        """Not so for a difference that is not a number."""
        return self.difference <= self.tolerance


def agreements(losses: Mapping[Arm, Mapping[str, Any]], bf16: bool) -> list[Agreement]:
    """Every quantity that two arms both have; an LM-only run shares its LM loss alone."""
    tolerances = TOLERANCES["bf16" if bf16 else "fp32"]
    return [
        Agreement(
            quantity=quantity,
            arms=(first, second),
            values=(losses[first][quantity], losses[second][quantity]),
            tolerance=tolerance,
        )
        for quantity, tolerance in tolerances.items()
        for first, second in combinations(losses, 2)
        if quantity == "lm" or "lm" not in (first, second)
    ]


def table(found: list[Agreement]) -> str:
    """One line per agreement."""
    return "\n".join(
        f"{'equal' if a.holds else 'DIFFER':<8}{a.quantity:<10} {a.arms[0]} {a.values[0]:.6g}, {a.arms[1]} "
        f"{a.values[1]:.6g}: relative difference {a.difference:.1e} (tolerance {a.tolerance:g})"
        for a in found
    )
