"""Rows and ratios from what was measured: a table to read, JSON to keep, a picture where matplotlib is."""

import dataclasses
import datetime
import json
import os
import platform
import statistics
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from laver_mcore.accounting.devices import peak_tflops
from tools.training_benchmark.account import Account
from tools.training_benchmark.measure import Measured, Results
from tools.training_benchmark.setting import Arm, Setting

RESULTS = Path(__file__).resolve().parent / "results"
GOAL = 1.05
"""LaVer may take this many times what the account says it should."""


def machine() -> dict[str, Any]:
    """Where it ran: device, versions, commit."""
    import importlib.metadata as metadata

    import torch

    cuda = torch.cuda.is_available()
    versions: dict[str, str | None] = {}
    for name in ("torch", "transformers", "megatron-core", "triton"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    return {
        "device": torch.cuda.get_device_name(0) if cuda else "cpu",
        "cpu": platform.machine(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "cuda": torch.version.cuda if cuda else None,
        **versions,
        "commit": _commit(),
    }


def _commit() -> str:
    """The commit, marked where the working tree differs from it; outside a repository what GIT_COMMIT says."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        done = subprocess.run(command, cwd=RESULTS.parent, capture_output=True, text=True, check=False)
    except OSError:  # no git here
        return os.environ.get("GIT_COMMIT", "unknown")
    return done.stdout.strip() or os.environ.get("GIT_COMMIT", "unknown")


def row(arm: Arm, measured: Measured, account: Account, peak: float | None) -> dict[str, Any]:
    """One arm's numbers; the step's time is the median over all timed steps."""
    steps = [second for each in measured.rounds for second in each]
    seconds = statistics.median(steps)
    moves = statistics.median(measured.teacher_moves) if measured.teacher_moves else None
    rate = account.useful_flops / seconds / 1e12
    return {
        "arm": arm,
        "step_ms": 1e3 * seconds,
        "step_ms_range": [1e3 * min(steps), 1e3 * max(steps)],
        "timed_steps": len(steps),
        "teacher_move_step_ms": None if moves is None else 1e3 * moves,
        "tokens_per_second": account.dialogue_tokens / seconds,
        "images_per_second": account.images / seconds,
        "peak_bytes": measured.peak_bytes,
        "useful_tflop": account.useful_flops / 1e12,
        "executed_tflop": account.executed_flops / 1e12,
        "counted_tflop": None if measured.counted_flops is None else measured.counted_flops / 1e12,
        "language_model_rows": account.packed_rows,
        "useful_tflops_per_second": rate,
        "mfu": None if peak is None else rate / peak,
    }


def ratio(slow: Measured, fast: Measured) -> dict[str, float]:
    """Time over time: the median over rounds that both have of the ratio of their medians, and the rounds' range."""
    found = [
        statistics.median(a) / statistics.median(b) for a, b in zip(slow.rounds, fast.rounds, strict=False)
    ]
    return {"median": statistics.median(found), "least": min(found), "most": max(found)}


def _counted(more: Measured, less: Measured) -> float | None:
    if more.counted_flops is None or less.counted_flops is None:
        return None
    return more.counted_flops / less.counted_flops


def ratios(measured: Mapping[Arm, Measured], accounts: Mapping[Arm, Account]) -> dict[str, Any]:
    """What the arms cost relative to each other, beside what the account says."""
    found: dict[str, Any] = {}
    if "lm" in measured and "laver" in measured:
        time, account = ratio(measured["laver"], measured["lm"]), accounts["laver"]
        useful = account.useful_flops / accounts["lm"].useful_flops
        found["laver_over_lm"] = {
            "time": time,
            "account_useful": useful,
            "account_executed": account.executed_flops / accounts["lm"].executed_flops,
            "counted": _counted(measured["laver"], measured["lm"]),
            "memory": measured["laver"].peak_bytes / measured["lm"].peak_bytes,
            "time_over_account": time["median"] / useful,
            "goal": GOAL,
        }
    if "released" in measured and "laver" in measured:
        executed = accounts["released"].executed_flops / accounts["laver"].executed_flops
        found["released_over_laver"] = {
            "time": ratio(measured["released"], measured["laver"]),
            "account_executed": executed,
            "counted": _counted(measured["released"], measured["laver"]),
            "memory": measured["released"].peak_bytes / measured["laver"].peak_bytes,
        }
    return found


def report(
    setting: Setting,
    where: Mapping[str, Any],
    command: str,
    results: Results,
    accounts: Mapping[Arm, Account],
) -> dict[str, Any]:
    """Everything, as it is kept in JSON."""
    peak, measured = peak_tflops(where["device"]), results.measured
    return {
        "machine": dict(where),
        "command": command,
        "date": datetime.date.today().isoformat(),
        "absolute_times_count": where["device"] != "cpu",
        "clock": {arm: found.clock for arm, found in measured.items()},
        "setting": dataclasses.asdict(setting),
        "equality": [{**dataclasses.asdict(a), "difference": a.difference} for a in results.agreed],
        "left_out": dict(results.left_out),
        "arms": [row(arm, found, accounts[arm], peak) for arm, found in measured.items()],
        "ratios": ratios(measured, accounts),
        "round_medians_ms": {
            arm: [1e3 * statistics.median(each) for each in found.rounds] for arm, found in measured.items()
        },
    }


def table(result: Mapping[str, Any]) -> str:
    """The report for reading."""
    head = f"{'arm':<10}{'step ms':>10}{'teacher':>10}{'tokens/s':>10}{'images/s':>10}{'peak GiB':>10}"
    lines = [head + f"{'useful TF':>11}{'run TF':>9}{'counted':>9}{'TF/s':>8}{'MFU':>8}"]
    for each in result["arms"]:
        move, mfu, counted = each["teacher_move_step_ms"], each["mfu"], each["counted_tflop"]
        lines.append(
            f"{each['arm']:<10}{each['step_ms']:>10.1f}{'-' if move is None else f'{move:.1f}':>10}"
            f"{each['tokens_per_second']:>10.0f}{each['images_per_second']:>10.2f}"
            f"{each['peak_bytes'] / 2**30:>10.2f}{each['useful_tflop']:>11.3g}{each['executed_tflop']:>9.3g}"
            f"{'-' if counted is None else f'{counted:.3g}':>9}"
            f"{each['useful_tflops_per_second']:>8.3g}{'-' if mfu is None else f'{mfu:.1%}':>8}"
        )
    lines += [f"{arm:<10}left out; it died {why}" for arm, why in result["left_out"].items()]
    lines.append("")
    laver = result["ratios"].get("laver_over_lm")
    if laver:
        lines.append(
            f"LaVer / LM-only: time {_range(laver['time'])}, account {laver['account_useful']:.3f} useful "
            f"({laver['account_executed']:.3f} executed{_counted_text(laver)}), memory {laver['memory']:.2f}; "
            "time / account "
            f"{laver['time_over_account']:.3f} (goal {laver['goal']:g} or less)"
        )
    released = result["ratios"].get("released_over_laver")
    if released:
        lines.append(
            f"released / LaVer: time {_range(released['time'])}, account {released['account_executed']:.3f} "
            f"executed{_counted_text(released)}, memory {released['memory']:.2f}"
        )
    if not result["absolute_times_count"]:
        lines.append("No GPU: no absolute time counts here, only ratios.")
    return "\n".join(lines)


def _counted_text(found: Mapping[str, Any]) -> str:
    return "" if found["counted"] is None else f", {found['counted']:.3f} counted by torch"


def _range(time: Mapping[str, float]) -> str:
    return f"{time['median']:.3f} ({time['least']:.3f} to {time['most']:.3f} over rounds)"


def file_stem(where: Mapping[str, Any], setting: Setting) -> str:
    """`<device>-<model>-<date>`."""
    model = setting.model
    if setting.hidden_size:
        model += f"-w{setting.hidden_size}"
    if setting.num_layers:
        model += f"-l{setting.num_layers}"
    return f"{where['device'].replace(' ', '-')}-{model}-{datetime.date.today().isoformat()}"


def keep(result: Mapping[str, Any], path: Path) -> None:
    """Write `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def write(result: Mapping[str, Any], path: Path) -> list[Path]:
    """Write `path` and, with matplotlib, a picture beside it."""
    keep(result, path)
    picture = _plot(result, path.with_suffix(".png"))
    return [path, picture] if picture else [path]


def _plot(result: Mapping[str, Any], path: Path) -> Path | None:
    """Bars of step time and peak memory; None without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    arms = [each["arm"] for each in result["arms"]]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(8, 3))
    left.bar(arms, [each["step_ms"] for each in result["arms"]], color="#4477aa")
    left.set_title("median step, ms", fontsize=9)
    right.bar(arms, [each["peak_bytes"] / 2**30 for each in result["arms"]], color="#cc6677")
    right.set_title("peak memory, GiB", fontsize=9)
    where = result["machine"]
    figure.suptitle(f"{result['setting']['model']} on {where['device']}, torch {where['torch']}", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return path
