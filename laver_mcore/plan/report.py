"""The planner's answer as text and as JSON."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

from laver_mcore.accounting.devices import GIB
from laver_mcore.accounting.tables import aligned
from laver_mcore.config.schema import Config
from laver_mcore.plan.layouts import Layout
from laver_mcore.plan.predict import RESERVED, TIME_PARTS, Prediction, predict
from laver_mcore.plan.setting import ASSUMED, BEST, WORST, Setting

_COLUMNS = (
    "TP", "PP", "VP", "CP", "DP", "MB", "recompute", "GiB", "step s", "range", "tok/s/GPU", "MFU", "range",
    "bubble", "comm",
)  # fmt: skip


def _range(found: Prediction, config: Config, setting: Setting) -> tuple[Prediction, Prediction]:
    """The same layout where everything goes well, and where nothing does."""
    applied = found.layout.apply(config)
    best, worst = (predict(applied, found.layout, replace(setting, rates=r)) for r in (BEST, WORST))
    return best, worst


def _cells(found: Prediction, config: Config, setting: Setting) -> list[str]:
    best, worst = _range(found, config, setting)
    layout = found.layout
    comm = found.tp_comm + found.cp_comm + found.pp_comm + found.dp_comm
    return [
        str(layout.tp), str(layout.pp), str(layout.vp), str(layout.cp), str(layout.dp), str(layout.micro_batch),
        layout.recompute or "none", f"{found.peak_memory / GIB:.1f}", f"{found.seconds:.2f}",
        f"{best.seconds:.2f}-{worst.seconds:.2f}", f"{found.tokens_per_second_per_gpu:,.0f}", f"{found.mfu:.0%}",
        f"{100 * worst.mfu:.0f}-{best.mfu:.0%}", f"{found.bubble / found.seconds:.1%}",
        f"{comm / found.seconds:.1%}",
    ]  # fmt: skip


def ranking(found: Sequence[Prediction], config: Config, setting: Setting) -> list[str]:
    """One line a layout, the fastest first."""
    return aligned([_COLUMNS, *(_cells(each, config, setting) for each in found)])


def flags(config: Config, layout: Layout) -> str:
    """What turns the recipe into one of this layout on a command line; empty where it is that already."""
    found, applied = [], layout.apply(config)
    for before, after in ((config.parallel, applied.parallel), (config.train, applied.train)):
        for name, value in asdict(after).items():
            flag = name.replace("_", "-")
            if value == getattr(before, name):
                continue
            if isinstance(value, bool):
                found.append(f"--{flag}" if value else f"--no-{flag}")
            else:
                found.append(f"--{flag} {value}")
    return " ".join(found)


def time_table(found: Prediction) -> list[str]:
    """Where the seconds of a step go."""
    cells = [f"{name.replace('_', ' ')} {getattr(found, name):.3f}" for name in TIME_PARTS]
    sent = [
        f"{name.replace('_', ' ')} {volume / GIB:.2f}" for name, volume in found.volumes.items() if volume
    ]
    return [f"seconds: {', '.join(cells)}", f"GiB sent per rank and step: {', '.join(sent) or 'none'}"]


def assumptions(setting: Setting) -> list[str]:
    """What the prediction rests on."""
    gpu, mix = setting.gpu, setting.mix
    forward, backward = gpu.attention
    rows = mix.grid[0] * mix.grid[1]
    return [
        f"assumed: a row holds {mix.images_per_row} dialogues of one image of {rows} visual tokens each, "
        f"{mix.supervised_share:.0%} of its tokens supervised",
        f"assumed: matrix products {setting.matmul_efficiency * gpu.tflops:.0f} TFLOP/s, attention "
        f"{forward * gpu.tflops:.0f} forward and {backward * gpu.tflops:.0f} backward, of {gpu.tflops:.0f}; "
        "no measurement of this project backs them yet",
        f"assumed: memory at {ASSUMED.memory:.0%} of {gpu.memory_bandwidth / 1e9:,.0f} GB/s, links at "
        f"{ASSUMED.link:.0%} of NVLink's {gpu.nvlink / 1e9:.0f} GB/s and the network's "
        f"{gpu.network / 1e9:.0f} GB/s per GPU; {RESERVED / GIB:.0f} GiB of {gpu.memory / GIB:.1f} GiB reserved",
        f"ranges: kernels at {BEST.kernels:.0%} to {WORST.kernels:.0%} of these rates, memory {BEST.memory:.0%} to "
        f"{WORST.memory:.0%}, links {BEST.link:.0%} to {WORST.link:.0%}",
    ]


def reasons(refused: Counter[str]) -> list[str]:
    """Why layouts were left out, the commonest reason first."""
    return [f"{count:>6}  {reason}" for reason, count in refused.most_common()]


def as_json(
    config: Config, setting: Setting, found: Sequence[Prediction], refused: Counter[str]
) -> dict[str, Any]:
    """Everything in numbers: bytes and seconds."""
    return {
        "model": config.model.model,
        "gpus": setting.num_gpus,
        "gpu": asdict(setting.gpu),
        "mix": asdict(setting.mix),
        "matmul_efficiency": setting.matmul_efficiency,
        "layouts": [
            {
                **each.layout.as_dict(),
                "memory": [asdict(memory) for memory in each.memory],
                "seconds": {name: getattr(each, name) for name in TIME_PARTS},
                "step_seconds": each.seconds,
                "flags": flags(config, each.layout),
                "tokens_per_second_per_gpu": each.tokens_per_second_per_gpu,
                "mfu": each.mfu,
                "bytes_sent": each.volumes,
            }
            for each in found
        ],
        "refused": dict(refused),
    }
