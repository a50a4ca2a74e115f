"""Rows of results: a table to read, JSON to keep, a plot to look at; each row says where it was measured."""

import dataclasses
import json
import subprocess
from dataclasses import dataclass
from pathlib import Path

import torch

# Measured bf16 matrix rate (TF/s) and copy bandwidth (GB/s): what a floor is computed from.
PEAKS = {"H200": (790.0, 4300.0), "A100-SXM4-80GB": (312.0, 2000.0), "A100": (312.0, 1600.0)}


@dataclass(frozen=True, kw_only=True)
class Machine:
    gpu: str
    torch: str
    triton: str
    cuda: str
    commit: str
    teraflops: float | None
    gigabytes: float | None
    l2_bytes: int

    @classmethod
    def here(cls) -> "Machine":
        import triton

        properties = torch.cuda.get_device_properties(0)
        peaks = next((peak for name, peak in PEAKS.items() if name in properties.name), (None, None))
        return cls(
            gpu=properties.name,
            torch=torch.__version__,
            triton=triton.__version__,
            cuda=str(torch.version.cuda),
            commit=_commit(),
            teraflops=peaks[0],
            gigabytes=peaks[1],
            l2_bytes=properties.L2_cache_size,
        )


@dataclass(frozen=True, kw_only=True)
class Row:
    operation: str
    case: str
    direction: str
    dtype: str
    milliseconds: float
    baselines: dict[str, float]  # name -> milliseconds
    rate: float
    unit: str
    share_of_floor: float | None
    peak_bytes: int


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
        numbers = f"{'ms':>9}{'rate':>14}{'of peak':>9}{'peak MB':>9}"
        lines.append(f"{'operation':<22}{'case':<42}{'direction':<10}{numbers}  baselines")
    for row in rows:
        share = "-" if row.share_of_floor is None else f"{100 * row.share_of_floor:.0f} %"
        others = ", ".join(
            f"{name} {ms:.3f} ({ms / row.milliseconds:.2f}x)" for name, ms in row.baselines.items()
        )
        rate = f"{row.rate:.0f} {row.unit}"
        lines.append(
            f"{row.operation:<22}{row.case:<42}{row.direction:<10}{row.milliseconds:>9.3f}{rate:>14}{share:>9}"
            f"{row.peak_bytes / 1e6:>9.0f}  {others}"
        )
    return "\n".join(lines)


def write(rows: list[Row], machine: Machine, folder: Path, is_partial: bool = False) -> list[Path]:
    """Writes `<gpu>.json`, `.txt` and, with matplotlib, `.png`; a partial run goes to `<gpu>-partial`."""
    folder.mkdir(exist_ok=True)
    stem = machine.gpu.replace(" ", "-") + ("-partial" if is_partial else "")
    where = {k: getattr(machine, k) for k in ("gpu", "torch", "triton", "cuda", "commit")}
    paths = [folder / f"{stem}.json", folder / f"{stem}.txt"]
    paths[0].write_text(json.dumps([dataclasses.asdict(row) | where for row in rows], indent=1) + "\n")
    title = ", ".join(f"{key} {value}" for key, value in where.items())
    paths[1].write_text(f"{title}\n\n{table(rows)}\n")
    picture = plot(rows, title, folder / f"{stem}.png")
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
