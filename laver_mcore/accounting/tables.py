"""Tables of text, right-aligned."""

from collections.abc import Sequence

from laver_mcore.accounting.devices import GIB
from laver_mcore.accounting.memory import MEMORY_PARTS, RankMemory


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """One line a row, columns as wide as their widest cell."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True)) for row in rows]


def in_units(flops: float) -> str:
    """A number of FLOPs as people say it: `21.4 PFLOP`."""
    for unit, size in (("PFLOP", 1e15), ("TFLOP", 1e12)):
        if flops >= size:
            return f"{flops / size:.1f} {unit}"
    return f"{flops / 1e9:.1f} GFLOP"


def memory_table(memories: Sequence[RankMemory]) -> list[str]:
    """GiB of every pipeline rank by part; neighbours that hold the same share a line."""
    rows: list[list[str]] = []
    first = 0
    for rank, memory in enumerate(memories):
        if rank + 1 < len(memories) and memories[rank + 1] == memory:
            continue
        values = [*(getattr(memory, part) for part in MEMORY_PARTS), memory.total]
        name = str(rank) if first == rank else f"{first}-{rank}"
        rows.append([name, *(f"{value / GIB:.2f}" for value in values)])
        first = rank + 1
    return aligned([["pipeline rank", *MEMORY_PARTS, "total"], *rows])
