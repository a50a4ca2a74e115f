"""The planner's answer as text and as JSON."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from laver_mcore.accounting.devices import GIB
from laver_mcore.accounting.tables import aligned
from laver_mcore.config.schema import Config
from laver_mcore.plan.predict import LINK_EFFICIENCY, RESERVED, TIME_PARTS, Prediction, Setting

_COLUMNS = (
    "TP", "PP", "VP", "CP", "DP", "MB", "recompute", "GiB", "step s", "tok/s/GPU", "MFU", "bubble", "comm",
)  # fmt: skip


def _cells(found: Prediction) -> list[str]:
    layout = found.layout
    comm = found.tp_comm + found.cp_comm + found.pp_comm + found.dp_comm
    return [
        str(layout.tp), str(layout.pp), str(layout.vp), str(layout.cp), str(layout.dp), str(layout.micro_batch),
        layout.recompute or "none", f"{found.peak_memory / GIB:.1f}", f"{found.seconds:.2f}",
        f"{found.tokens_per_second_per_gpu:,.0f}", f"{found.mfu:.1%}", f"{found.bubble / found.seconds:.1%}",
        f"{comm / found.seconds:.1%}",
    ]  # fmt: skip


def ranking(found: Sequence[Prediction]) -> list[str]:
    """One line a layout, the fastest first."""
    return aligned([_COLUMNS, *(_cells(each) for each in found)])


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
        f"assumed: links at {LINK_EFFICIENCY:.0%} of NVLink's {gpu.nvlink / 1e9:.0f} GB/s and the network's "
        f"{gpu.network / 1e9:.0f} GB/s per GPU; {RESERVED / GIB:.0f} GiB of {gpu.memory / GIB:.1f} GiB reserved",
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
                "tokens_per_second_per_gpu": each.tokens_per_second_per_gpu,
                "mfu": each.mfu,
                "bytes_sent": each.volumes,
            }
            for each in found
        ],
        "refused": dict(refused),
    }
