"""Times candidate tiles on this GPU, and prints the entries for `laver_kernels/configs.py`.

    python kernels/benchmarks/tune.py --only "forward', 128"    # one kernel: about three minutes
    python kernels/benchmarks/tune.py --only gram
    python kernels/benchmarks/tune.py                           # all kernels at the 7B and 0.5B shapes

A candidate counts only if it passes the same check as the tests. Nothing is searched at run time: what is
found here is written into the table by hand, beside its measurement in `kernels/README.md`.
"""

import argparse
import dataclasses
import itertools
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from registry import attention_workload, gram_workload
from timing import CudaClock, with_gradients

from laver_kernels import configs
from laver_kernels.configs import Tile
from laver_kernels.testing import attention_problem, gram_problem, measure
from laver_kernels.testing_masks import image, many_image_documents, text

GUARD = ((text(70), image(200), text(9)), (image(129), text(40)))


def attention_candidates() -> Iterator[Tile]:
    for rows, columns, warps, stages in itertools.product((32, 64, 128), (32, 64, 128), (4, 8), (2, 3, 4)):
        if rows * columns >= 2048:  # smaller ones never fill the tensor cores
            yield Tile(rows=rows, columns=columns, num_warps=warps, num_stages=stages)


def gram_candidates() -> Iterator[Tile]:
    for side, depth, warps, stages in itertools.product((64, 128), (32, 64, 128), (4, 8), (2, 3, 4)):
        yield Tile(rows=side, columns=side, depth=depth, num_warps=warps, num_stages=stages)


def tune(
    table: dict, key: tuple, candidates: Iterator[Tile], is_right: Callable[[], bool], time: Callable
) -> Tile:
    """Tries candidates in the table's place, prints what beats the last best, and leaves the best there."""
    original = table[key]
    best, best_ms = original, time()
    print(f"{key}: {best_ms:.3f} ms as it stands, {_fields(original)}", flush=True)
    for tile in candidates:
        table[key] = tile
        try:
            ms = time() if is_right() else float("inf")
        except Exception as error:  # too much shared memory, or a tile that the compiler refuses
            print(f"    {_fields(tile)}: {type(error).__name__}")
            continue
        if ms < best_ms:
            best, best_ms = tile, ms
            print(f"    {ms:.3f} ms  {_fields(tile)}", flush=True)
    table[key] = best
    print(f"{key!r}: Tile({_fields(best)}),  # {best_ms:.3f} ms", flush=True)
    return best


def _fields(tile: Tile) -> str:
    given = {f.name: getattr(tile, f.name) for f in dataclasses.fields(tile)}
    return ", ".join(f"{name}={value}" for name, value in given.items() if value)


def _timer(workload, direction: str, repeats: int) -> Callable[[], float]:
    inputs = [
        {name: x.requires_grad_() for name, x in workload.make_inputs(seed).items()} for seed in range(2)
    ]

    def forward(copy):
        with torch.no_grad():
            return workload.ours(**copy)

    def both(copy):
        return with_gradients(workload.ours, copy)

    call, clock = forward if direction == "forward" else both, CudaClock()
    return lambda: statistics.median(clock.milliseconds(call, inputs, repeats))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="only kernels whose table key contains this")
    parser.add_argument("--repeats", type=int, default=20, help="timed repetitions of each candidate")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("No CUDA GPU: there is nothing to tune.")
        return 0
    arch = configs.architecture(torch.device("cuda"))
    for head_dim, heads in ((128, (28, 4)), (64, (14, 2))):
        workload = attention_workload(many_image_documents(8192), heads, head_dim, rotate=True)
        problem = attention_problem(
            "guard", GUARD, heads=(7, 1), head_dim=head_dim, dtype=torch.bfloat16, device="cuda"
        )
        for kernel in ("forward", "dq", "dkdv"):
            key = (arch, kernel, head_dim)
            if arguments.only in f"attention {key}":
                timer = _timer(workload, "forward" if kernel == "forward" else "both", arguments.repeats)
                tune(configs.ATTENTION, key, attention_candidates(), lambda p=problem: _is_right(p), timer)
    workload = gram_workload((729,) * 64, 3584)
    problem = gram_problem("guard", (300, 70), width=512, dtype=torch.bfloat16, device="cuda")
    for kernel in ("forward", "backward"):
        if arguments.only in f"gram {kernel}":
            timer = _timer(workload, "both", arguments.repeats)
            tune(configs.GRAM, (arch, kernel), gram_candidates(), lambda: _is_right(problem), timer)
    return 0


def _is_right(problem) -> bool:
    return all(error.is_ok for error in measure(problem, "triton"))


if __name__ == "__main__":
    sys.exit(main())
