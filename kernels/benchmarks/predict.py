"""What the performance model predicts for every attention case of `run.py`; writes `predictions.json`.

    python kernels/benchmarks/predict.py            # prints the table; needs no GPU
    python kernels/benchmarks/predict.py --write    # and keeps it, for the first hour's comparison

A prediction is a share of the tensor peak: useful FLOPs of the case over what the matrix units could do in its cycles,
so that it holds at any clock; times the rate of a bare matrix product it is a rate. The cycles are those of the
machine code's loops (`kernels/performance.py`), one turn for every step of every tile that the mask asks for, and of
the code around them, on as many multiprocessors as there are, each program where the first place is free.
"""

import argparse
import heapq
import itertools
import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from registry import HEADS, MIXES, TOKENS

from laver_kernels.aot_cases import Case, attention_case, specialised_case
from laver_kernels.mixed_attention.intervals import Intervals
from laver_kernels.testing_masks import intervals_of
from multiprocessor import LATENCY, MACHINES, QUARTERS

PREDICTIONS = Path(__file__).with_name("predictions.json")
MULTIPROCESSORS = {"sm_80": 108, "sm_90": 132}
# Cycles at the clock at which a bare product reaches 280 and 790 TF/s; nine tenths of 2.0 and 3.35 TB/s.
BYTES_PER_CYCLE = {"sm_80": 1.8e12 / (280e12 / (108 * 2048)), "sm_90": 3.0e12 / (790e12 / (132 * 4096))}
ROUND_TRIPS = 3  # to memory before the first step and after the last: intervals, tiles, results


@dataclass(frozen=True)
class Kernel:
    """Cycles of a compiled kernel's program: of one step in each of its phases, and of all that is no step."""

    phases: tuple[float, float, float]  # with both bounds, with none, with upper bounds alone
    around: float
    programs: int  # resident on a multiprocessor
    step: int
    tile: int


def kernel_of(case: Case, by_columns: bool = False) -> Kernel:
    """The model's figures of a configuration; `by_columns` where keys stay and queries pass by."""
    from aot import compile_case  # refuses where kernels are interpreted, as in the tests of all else here

    got = compile_case(case)
    costs = [loop.cycles for loop in got.loops]
    low, full, high = costs if len(costs) == 3 else costs * 3
    in_loops = sum(loop.instructions for loop in got.loops)
    issue = (got.instructions - in_loops) * got.programs * case.tile.num_warps / QUARTERS
    tile, step = case.tile.rows, case.tile.columns
    return Kernel(
        phases=(low, full, high),
        around=issue + ROUND_TRIPS * LATENCY["memory"],
        programs=got.programs,
        step=tile if by_columns else step,
        tile=step if by_columns else tile,
    )


def steps_of(lo_T: Tensor, hi_T: Tensor, num_others: int, tile: int, step: int) -> Tensor:
    """`[tiles, 3]`: the steps of every tile with both bounds, with none and with upper bounds alone.

    `phase_bounds` of the kernels, for all tiles at once; rows past the last take no part.
    """
    num_tiles = -(-len(lo_T) // tile)
    is_real = torch.arange(num_tiles * tile).view(num_tiles, tile) < len(lo_T)
    pad = num_tiles * tile - len(lo_T)
    lo, hi = (torch.nn.functional.pad(x.long(), (0, pad)).view(num_tiles, tile) for x in (lo_T, hi_T))
    is_live = is_real & (lo < hi)
    first = torch.where(is_live, lo, num_others).amin(1) // step
    end = -(-torch.where(is_live, hi, 0).amax(1) // step)
    full_from = -(-torch.where(is_real, lo, 0).amax(1) // step)
    full_to = torch.where(is_real, hi, num_others).amin(1) // step
    has_full = full_from < full_to
    low = torch.where(has_full, full_from, end) - first
    full = torch.where(has_full, full_to - full_from, 0)
    high = torch.where(has_full, end - full_to, 0)
    return torch.stack([low, full, high], 1).clamp(min=0)


def makespan(durations: Iterable[float], places: int) -> float:
    """When the last of the programs ends, each begun in order where a place is free first."""
    free = [0.0] * places
    for duration in durations:
        heapq.heapreplace(free, free[0] + duration)
    return max(free)


def cycles_of(kernel: Kernel, steps: Tensor, launches: int, turns: int, arch: str) -> float:
    """A whole kernel: all tiles for each of `launches` heads, each tile `turns` times over."""
    each = (steps.double() @ torch.tensor(kernel.phases, dtype=torch.float64)) * turns + kernel.around
    order = each.tolist()
    return makespan(
        itertools.chain.from_iterable([order] * launches), MULTIPROCESSORS[arch] * kernel.programs
    )


@dataclass(frozen=True)
class Attention:
    """The three kernels of an architecture and head dimension."""

    arch: str
    head_dim: int
    forward: Kernel
    dq: Kernel
    dkdv: Kernel

    @classmethod
    def compiled(cls, arch: str, head_dim: int) -> "Attention":
        is_specialised = arch == "sm_90" and head_dim == 128
        forward = specialised_case() if is_specialised else attention_case(arch, "forward", head_dim)
        return cls(
            arch,
            head_dim,
            kernel_of(forward),
            kernel_of(attention_case(arch, "dq", head_dim)),
            kernel_of(attention_case(arch, "dkdv", head_dim), by_columns=True),
        )

    def shares(self, mask: Intervals, heads: tuple[int, int]) -> dict[str, float]:
        """Useful work of forward and backward over what the matrix units could do in their cycles."""
        num_tokens, (num_heads, num_groups), group = len(mask), heads, heads[0] // heads[1]
        rows, columns = (mask.row_lo_T, mask.row_hi_T), (mask.col_lo_T, mask.col_hi_T)
        # In a long document the last rows see most: the kernels take them first.
        forward = steps_of(*rows, num_tokens, self.forward.tile, self.forward.step).flip(0)
        dq = steps_of(*rows, num_tokens, self.dq.tile, self.dq.step).flip(0)
        dkdv = steps_of(*columns, num_tokens, self.dkdv.tile, self.dkdv.step)
        # As `head_splits` decides: one program for a group where that is enough of them.
        splits = 1 if len(dkdv) * num_groups >= 8 * MULTIPROCESSORS[self.arch] else group
        partial_bytes = 2 * num_tokens * num_groups * self.head_dim * (4 * splits * 2 + 2)
        cycles = {
            "forward": cycles_of(self.forward, forward, num_heads, 1, self.arch),
            "backward": cycles_of(self.dq, dq, num_heads, 1, self.arch)
            + cycles_of(self.dkdv, dkdv, num_groups * splits, group // splits, self.arch)
            + partial_bytes / BYTES_PER_CYCLE[self.arch],
        }
        pairs = int((mask.row_hi_T - mask.row_lo_T).clamp(min=0).sum())
        product = 2.0 * num_heads * self.head_dim * pairs
        peak = MULTIPROCESSORS[self.arch] * MACHINES[self.arch].matrix_flop
        return {
            name: {"forward": 2, "backward": 5}[name] * product / (peak * cycles[name]) for name in cycles
        }


def cases() -> Iterator[tuple[str, Intervals, tuple[int, int], int]]:
    """Name, mask, heads and head dimension of the attention cases of `registry.py` that rotate nothing."""
    for (mix, documents_of), num_tokens in itertools.product(MIXES.items(), TOKENS):
        if mix == "full" and num_tokens > 8192:
            continue
        mask = intervals_of(documents_of(num_tokens))
        for tensor_parallel, heads in HEADS.items():
            yield f"{mix}, T={num_tokens}, TP={tensor_parallel}", mask, heads, 128
    yield "five images, T=8192, 0.5B (14/2/64)", intervals_of(MIXES["five images"](8192)), (14, 2), 64


def predict(arch: str) -> dict[str, float]:
    """`{"operation, case, direction": share of the tensor peak}`."""
    kernels = {head_dim: Attention.compiled(arch, head_dim) for head_dim in (64, 128)}
    return {
        f"mixed_attention, {name}, {direction}": round(share, 4)
        for name, mask, heads, head_dim in cases()
        for direction, share in kernels[head_dim].shares(mask, heads).items()
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help=f"into {PREDICTIONS.name}")
    arguments = parser.parse_args(argv)
    found = {arch: predict(arch) for arch in MULTIPROCESSORS}
    for arch, shares in found.items():
        for name, share in shares.items():
            print(f"{arch}  {share:.3f}  {name}")
    if arguments.write:
        PREDICTIONS.write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
