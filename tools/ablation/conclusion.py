"""An ablation's summary in words: two tables a task, and a sentence for each finding of the paper."""

from typing import Any

FINDINGS = (
    ("mixed", "lm", "accuracy", 1, "mixed attention alone helps"),
    ("rope_2d", "lm", "accuracy", 1, "2D positions alone help"),
    ("both", "mixed", "accuracy", 1, "2D positions help with mixed attention"),
    ("both", "lm", "accuracy", 1, "both together help"),
    ("both", "both_contiguous", "accuracy", 1, "interleaved bands read better than contiguous ones"),
    ("mim", "both", "accuracy", 1, "masked reconstruction alone helps"),
    ("ga", "both", "accuracy", 1, "reconstruction with the symmetric Gram loss helps"),
    ("cga", "both", "accuracy", 1, "LaVer (MIM + CGA) helps"),
    ("cga", "mim", "accuracy", 1, "the clipped Gram loss adds accuracy to reconstruction"),
    ("cga", "ga", "accuracy", 1, "the clipped Gram loss reads better than the symmetric one"),
    ("mim", "both", "similarity", 1, "reconstruction alone makes an image's tokens more alike (collapse)"),
    ("cga", "mim", "similarity", -1, "the clipped Gram loss keeps them apart"),
    ("cga", "ga", "less_alike", 1, "more pairs are less alike than the teacher's under the clipped loss"),
)
"""Arm, the one it is compared with, of what, the sign that the paper has it, and what that would say."""


def verdict(test: dict[str, Any], sign: int) -> str:
    """Whether a difference over seeds has the sign at 95 %, has the other one, or is not shown."""
    if test["low"] is None:
        return "is not tested"
    if sign * test["mean"] > 0 and test["low"] * test["high"] > 0:
        return "holds"
    return "is contradicted" if test["low"] * test["high"] > 0 else "is not shown"


def _points(test: dict[str, Any], scale: float) -> str:
    digits = 1 if scale == 100 else 3
    mean = f"{scale * test['mean']:+.{digits}f}"
    if test["low"] is None:
        return mean
    return f"{mean} ({scale * test['low']:+.{digits}f} to {scale * test['high']:+.{digits}f})"


def _plus_minus(value: dict[str, Any], scale: float, digits: int) -> str:
    spread = "" if value["std"] is None else f" ± {scale * value['std']:.{digits}f}"
    return f"{scale * value['mean']:.{digits}f}{spread}"


def _arms(arms: dict[str, Any]) -> list[str]:
    lines = [
        "| arm | seeds | digits read, % | similarity, layer 1 | last layer | effective rank, last | less alike, % |",
        "|---|---|---|---|---|---|---|",
    ]
    for arm in arms.values():
        less = arm["over_training"].get("less_alike")
        share = "" if less is None else f"{100 * sum(less) / len(less):.1f}"
        first, last = (_plus_minus(arm["similarity_by_layer"][layer], 1, 3) for layer in (0, -1))
        lines.append(
            f"| {arm['title']} | {len(arm['seeds'])} | {_plus_minus(arm['accuracy'], 100, 1)} "
            f"| {first} | {last} "
            f"| {_plus_minus(arm['rank_by_layer'][-1], 1, 1)} | {share} |"
        )
    return lines


def _comparisons(task: dict[str, Any]) -> list[str]:
    lines = [
        "| arm | against | points, over seeds | p | p (Holm) | points, over pages | similarity, over seeds |",
        "|---|---|---|---|---|---|---|",
    ]
    for each in task["comparisons"]:
        seeds, pages = each["accuracy_over_seeds"], each["accuracy_over_pages"]
        p, adjusted = ("" if value is None else f"{value:.3f}" for value in (seeds["p"], seeds["p_holm"]))
        ours, theirs = (task["arms"][each[name]]["title"] for name in ("arm", "against"))
        lines.append(
            f"| {ours} | {theirs} | {_points(seeds, 100)} | {p} | {adjusted} | {_points(pages, 100)} "
            f"| {_points(each['similarity_over_seeds'], 1)} |"
        )
    return lines


def _findings(task: dict[str, Any]) -> list[str]:
    tests = {(each["arm"], each["against"]): each for each in task["comparisons"]}
    lines = []
    for arm, against, quantity, sign, claim in FINDINGS:
        test = tests.get((arm, against), {}).get(f"{quantity}_over_seeds")
        if test is not None:
            scale = 1 if quantity == "similarity" else 100
            unit = "" if quantity == "similarity" else " points"
            lines.append(
                f"- *{claim[0].upper()}{claim[1:]}* {verdict(test, sign)}: {_points(test, scale)}{unit}, "
                f"{test['pairs']} {'seed' if test['pairs'] == 1 else 'seeds'}."
            )
    return lines


def conclusion(summary: dict[str, Any]) -> str:
    """Markdown, from the numbers alone; intervals are 95 %, Student's, uncorrected, and of the seeds unless said."""
    parts = []
    for name, task in summary.items():
        parts += [f"### Task `{name}`", "\n".join(_arms(task["arms"]))]
        if task["comparisons"]:
            parts += ["\n".join(_comparisons(task)), "\n".join(_findings(task))]
    return "\n\n".join(part for part in parts if part) + "\n"
