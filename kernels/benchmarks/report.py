"""Rows of results: a table to read, JSON to keep, a plot to look at; each row says where it was measured."""

import contextlib
import dataclasses
import json
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

import torch


@dataclass(frozen=True, kw_only=True)
class Machine:
    gpu: str
    torch: str
    triton: str
    cuda: str
    commit: str
    teraflops: (
        float | None
    )  # bf16 matrix rate and copy bandwidth, measured in this run: what floors are made of
    gigabytes: float | None
    l2_bytes: int
    power_limit_watts: float | None = None

    @classmethod
    def here(cls, commit: str | None = None) -> "Machine":
        """This GPU and these versions; `commit` names the sources where they lie outside a repository."""
        import triton

        properties = torch.cuda.get_device_properties(0)
        return cls(
            gpu=properties.name,
            torch=torch.__version__,
            triton=triton.__version__,
            cuda=str(torch.version.cuda),
            commit=commit or _commit(),
            teraflops=None,
            gigabytes=None,
            l2_bytes=properties.L2_cache_size,
            power_limit_watts=gpu_state().get("power_limit_watts"),
        )


@dataclass(frozen=True, kw_only=True)
class Row:
    operation: str
    case: str
    direction: str
    dtype: str
    milliseconds: float
    rate: float
    unit: str
    floor_ms: (
        float | None
    )  # by arithmetic or by bytes, whichever is longer; None where peaks were not measured
    peak_bytes: int  # over the inputs
    baselines: dict[str, float]  # name -> milliseconds
    baseline_peak_bytes: dict[str, int] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)  # baseline -> why it has no time
    state: dict[str, float] = field(
        default_factory=dict
    )  # of the GPU after the case: clocks, power, temperature
    peaks: dict[str, float] = field(default_factory=dict)  # TF/s and GB/s that the floor was computed from

    @property
    def share_of_floor(self) -> float | None:
        return None if self.floor_ms is None else self.floor_ms / self.milliseconds


STATE = {  # what nvidia-smi calls it -> what we do
    "clocks.sm": "sm_megahertz",
    "clocks.mem": "memory_megahertz",
    "power.draw": "watts",
    "power.limit": "power_limit_watts",
    "temperature.gpu": "celsius",
}


def gpu_state() -> dict[str, float]:
    """Clocks, power and temperature at this moment; empty where nvidia-smi does not answer."""
    command = ["nvidia-smi", "--id=0", f"--query-gpu={','.join(STATE)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return {}
    return parsed_state(done.stdout) if done.returncode == 0 else {}


def parsed_state(line: str) -> dict[str, float]:
    """One line of nvidia-smi's answer; what it does not know is left out."""
    found = {}
    for name, value in zip(STATE.values(), line.strip().split(","), strict=False):
        with contextlib.suppress(ValueError):
            found[name] = float(value)
    return found


def _commit() -> str:
    """The commit, marked where the working tree differs from it; "unknown" outside a repository."""
    here = Path(__file__).resolve().parent
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    done = subprocess.run(command, cwd=here, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def table(rows: list[Row], header: bool = True) -> str:
    """One line per row; every baseline with its time and how many times longer it takes."""
    lines = []
    if header:
        numbers = f"{'ms':>9}{'rate':>14}{'of floor':>9}{'peak MB':>9}"
        lines.append(
            f"{'operation':<22}{'case':<42}{'direction':<10}{numbers}  baselines: ms, times ours, peak MB"
        )
    for row in rows:
        share = "-" if row.share_of_floor is None else f"{100 * row.share_of_floor:.0f} %"
        others = ", ".join(
            [_baseline(row, name) for name in row.baselines]
            + [f"{name}: {reason}" for name, reason in row.left_out.items()]
        )
        rate = f"{row.rate:.0f} {row.unit}"
        lines.append(
            f"{row.operation:<22}{row.case:<42}{row.direction:<10}{row.milliseconds:>9.3f}{rate:>14}{share:>9}"
            f"{row.peak_bytes / 1e6:>9.0f}  {others}"
        )
    return "\n".join(lines)


def _baseline(row: Row, name: str) -> str:
    ms, peak = row.baselines[name], row.baseline_peak_bytes.get(name)
    memory = "" if peak is None else f", {peak / 1e6:.0f}"
    return f"{name} {ms:.3f} ({ms / row.milliseconds:.2f}x{memory})"


def read(machine: Machine, folder: Path) -> list[Row]:
    """Rows written before on this GPU by this commit under these versions: a run in several calls adds to them."""
    path = folder / f"{_stem(machine)}.json"
    if not path.is_file():
        return []
    names = [each.name for each in dataclasses.fields(Row)]
    return [
        Row(**{name: row[name] for name in names if name in row})
        for row in json.loads(path.read_text(encoding="utf-8"))
        if all(row[key] == value for key, value in _where(machine).items())
    ]


def _stem(machine: Machine) -> str:
    return machine.gpu.replace(" ", "-")


def _where(machine: Machine) -> dict[str, str]:
    return {k: getattr(machine, k) for k in ("gpu", "torch", "triton", "cuda", "commit")}


def write(rows: list[Row], machine: Machine, folder: Path) -> list[Path]:
    """Writes `<gpu>.json`, `.txt` and, with matplotlib, `.png`."""
    folder.mkdir(parents=True, exist_ok=True)
    where = _where(machine)
    paths = [folder / f"{_stem(machine)}.json", folder / f"{_stem(machine)}.txt"]
    paths[0].write_text(json.dumps([dataclasses.asdict(row) | where for row in rows], indent=1) + "\n")
    title = ", ".join(f"{key} {value}" for key, value in where.items())
    paths[1].write_text(f"{title}\n\n{table(rows)}\n")
    picture = plot(rows, title, folder / f"{_stem(machine)}.png")
    return [*paths, picture] if picture else paths


def plot(rows: list[Row], title: str, path: Path) -> Path | None:
    """Speed over every baseline, one bar each; None without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    bars = [
        (f"{row.operation} {row.case} {row.direction}: {name}", ms / row.milliseconds)
        for row in rows
        for name, ms in row.baselines.items()
    ]
    figure, axes = pyplot.subplots(figsize=(12, 2 + 0.22 * len(bars)))
    axes.barh([name for name, _ in bars], [speed for _, speed in bars], color="#4477aa")
    axes.axvline(1.0, color="#cc3311", linewidth=1)
    axes.set_xscale("log")
    axes.set_xlabel("times as fast as the baseline")
    axes.set_title(title, fontsize=8)
    axes.tick_params(axis="y", labelsize=6)
    axes.invert_yaxis()
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
    return path
