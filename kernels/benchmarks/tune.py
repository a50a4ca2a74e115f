"""Times candidate tiles on this GPU, and prints the entries for `laver_kernels/configs.py`.

    python kernels/benchmarks/tune.py --write                   # all kernels at the 7B and 0.5B shapes, keeps the best
    python kernels/benchmarks/tune.py --only "forward', 128"    # one kernel
    python kernels/benchmarks/tune.py --only gram --all         # every tile, not the short list: a quarter of an hour

A candidate counts only if it passes the same check as the tests. Nothing is searched at run time: what is
found here stands in the table (`--write` puts it there), beside its measurement in `kernels/README.md`.
"""

import argparse
import dataclasses
import importlib
import itertools
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from registry import attention_workload, gram_workload
from timing import CudaClock, measure_direction
from workload import Workload

from laver_kernels import configs
from laver_kernels.configs import Tile
from laver_kernels.testing import attention_problem, gram_problem, measure
from laver_kernels.testing_masks import image, many_image_documents, text

GUARD = ((text(70), image(200), text(9)), (image(129), text(40)))
CONFIGS = Path(configs.__file__)

# By architecture: what the performance model (`kernels/performance.py`) puts next to the tile in the table.
SHORT_LIST = {  # rows, columns, warps, stages
    ("sm_80", "forward", 128): [(128, 32, 4, 2), (128, 32, 4, 4), (128, 64, 8, 3), (64, 64, 4, 2)],
    ("sm_80", "dq", 128): [(128, 32, 4, 2), (64, 64, 4, 2), (128, 64, 8, 3), (128, 32, 8, 2)],
    ("sm_80", "dkdv", 128): [(64, 128, 8, 3), (32, 128, 8, 3), (64, 64, 8, 2), (32, 64, 4, 3)],
    ("sm_80", "forward", 64): [(128, 64, 4, 2), (128, 128, 8, 2), (64, 64, 4, 3), (128, 32, 4, 3)],
    ("sm_80", "dq", 64): [(128, 64, 8, 2), (64, 64, 4, 3), (128, 32, 4, 2)],
    ("sm_80", "dkdv", 64): [(64, 64, 4, 3), (32, 128, 4, 2), (64, 128, 8, 2), (32, 64, 4, 3)],
    ("sm_90", "forward", 128): [(128, 64, 8, 3), (128, 128, 8, 2), (64, 64, 4, 3), (128, 64, 8, 4)],
    ("sm_90", "dq", 128): [(128, 128, 8, 2), (64, 64, 4, 2), (128, 64, 8, 2), (128, 32, 8, 3)],
    ("sm_90", "dkdv", 128): [(64, 64, 4, 2), (64, 128, 8, 2), (32, 128, 8, 3), (64, 64, 8, 3)],
    ("sm_90", "forward", 64): [(128, 128, 8, 2), (64, 64, 4, 3), (128, 128, 8, 3), (64, 64, 4, 2)],
    ("sm_90", "dq", 64): [(64, 64, 4, 2), (128, 128, 8, 3), (64, 64, 4, 3), (128, 64, 8, 2)],
    ("sm_90", "dkdv", 64): [(128, 64, 4, 2), (64, 128, 8, 3), (64, 64, 4, 2)],
}
GRAM_SHORT_LIST = {  # rows, columns, depth, warps, stages; a Gram tile is square
    ("sm_80", "forward"): [
        (128, 128, 32, 8, 4),
        (128, 128, 32, 4, 3),
        (64, 64, 64, 4, 3),
        (128, 128, 64, 8, 2),
    ],
    ("sm_80", "backward"): [
        (128, 128, 32, 8, 4),
        (128, 128, 32, 4, 3),
        (128, 256, 32, 8, 3),
        (64, 256, 32, 4, 3),
    ],
    ("sm_90", "forward"): [
        (128, 128, 64, 8, 4),
        (128, 128, 64, 8, 2),
        (128, 128, 32, 8, 4),
        (64, 64, 64, 4, 4),
    ],
    ("sm_90", "backward"): [
        (128, 128, 64, 8, 4),
        (128, 256, 64, 8, 3),
        (128, 256, 64, 8, 4),
        (64, 256, 64, 4, 3),
    ],
}


def attention_candidates(arch: str, kernel: str, head_dim: int, is_all: bool) -> Iterator[Tile]:
    chosen: Iterable[tuple[int, ...]] = SHORT_LIST[arch, kernel, head_dim]
    if is_all:
        chosen = itertools.product((32, 64, 128), (32, 64, 128), (4, 8), (2, 3, 4))
    for rows, columns, warps, stages in chosen:
        if rows * columns >= 2048:  # smaller ones never fill the tensor cores
            yield Tile(rows=rows, columns=columns, num_warps=warps, num_stages=stages)


def gram_candidates(arch: str, kernel: str, is_all: bool) -> Iterator[Tile]:
    chosen: Iterable[tuple[int, ...]] = GRAM_SHORT_LIST[arch, kernel]
    if is_all:
        columns = (64, 128) if kernel == "forward" else (64, 128, 256)
        chosen = itertools.product((64, 128), columns, (32, 64, 128), (4, 8), (2, 3, 4))
    for rows, columns, depth, warps, stages in chosen:
        if rows == columns or kernel == "backward":
            yield Tile(rows=rows, columns=columns, depth=depth, num_warps=warps, num_stages=stages)


def tune(
    table: dict, key: tuple, candidates: Iterable[Tile], is_right: Callable[[], bool], time: Callable
) -> Tile:
    """Tries candidates in the table's place, prints their times, and leaves the best there."""
    original = table[key]
    best, best_ms = original, time()
    print(f"{key}: {best_ms:.3f} ms as it stands, {_fields(original)}", flush=True)
    for tile in candidates:
        if tile == original:
            continue
        table[key] = tile
        try:
            ms = time() if is_right() else float("inf")
        except Exception as error:  # too much shared memory, or a tile that the compiler refuses
            print(f"    {_fields(tile)}: {type(error).__name__}", flush=True)
            continue
        # inf: it disagrees with the oracle.
        print(f"    {ms:.3f} ms  {_fields(tile)}", flush=True)
        if ms < best_ms:
            best, best_ms = tile, ms
    table[key] = best
    print(f"{_entry(key, best)}  # {best_ms:.3f} ms", flush=True)
    return best


def _entry(key: tuple, tile: Tile) -> str:
    """The line of `configs.py`."""
    names = ", ".join(f'"{part}"' if isinstance(part, str) else str(part) for part in key)
    return f"({names}): Tile({_fields(tile)}),"


def write(path: Path, key: tuple, tile: Tile) -> None:
    """Replaces a key's line in the source of the table."""
    entry = _entry(key, tile)
    start = "    " + entry[: entry.index("Tile(")]
    lines = path.read_text().splitlines()
    (at,) = (number for number, line in enumerate(lines) if line.startswith(start))
    lines[at] = f"    {entry}"
    path.write_text("\n".join(lines) + "\n")


def _fields(tile: Tile) -> str:
    given = {f.name: getattr(tile, f.name) for f in dataclasses.fields(tile)}
    return ", ".join(f"{name}={value}" for name, value in given.items() if value)


def _timer(workload: Workload, direction: str, repeats: int) -> Callable[[], float]:
    copies = [
        {name: x.requires_grad_() for name, x in workload.make_inputs(seed).items()} for seed in range(2)
    ]
    clock = CudaClock()
    return lambda: measure_direction(workload.ours, copies, direction, repeats, clock)[0]


def time_splits(workload: Workload, group: int, repeats: int) -> None:
    """The backward with a partial dk and dv per query head, and with one program for a whole group."""
    launches = importlib.import_module(
        "laver_kernels.mixed_attention.triton"
    )  # its package holds a function so named
    original = launches.head_splits
    for splits in (1, group):
        launches.head_splits = lambda programs, group, device, splits=splits: splits
        print(f"head_splits {splits}: {_timer(workload, 'backward', repeats)():.3f} ms", flush=True)
    launches.head_splits = original


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="only kernels whose table key contains this")
    parser.add_argument("--repeats", type=int, default=20, help="timed repetitions of each candidate")
    parser.add_argument("--all", action="store_true", help="every tile in place of the short list")
    parser.add_argument("--write", action="store_true", help="put the best into configs.py")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    arguments = parse(argv)
    if not torch.cuda.is_available():
        print("No CUDA GPU: there is nothing to tune.")
        return 0
    arch = configs.architecture(torch.device("cuda"))

    def search(
        table: dict, key: tuple, candidates: Iterator[Tile], problem, workload, direction: str
    ) -> None:
        timer = _timer(workload, direction, arguments.repeats)
        best = tune(table, key, candidates, lambda: _is_right(problem), timer)
        if arguments.write:
            write(CONFIGS, key, best)

    for head_dim, heads in ((128, (28, 4)), (64, (14, 2))):
        workload = attention_workload(many_image_documents(8192), heads, head_dim, rotate=True)
        problem = attention_problem(
            "guard", GUARD, heads=(7, 1), head_dim=head_dim, dtype=torch.bfloat16, device="cuda"
        )
        for kernel in ("forward", "dq", "dkdv"):
            key = (arch, kernel, head_dim)
            if arguments.only in f"attention {key}":
                direction = "forward" if kernel == "forward" else "backward"
                candidates = attention_candidates(arch, kernel, head_dim, arguments.all)
                search(configs.ATTENTION, key, candidates, problem, workload, direction)
        if arguments.only in f"attention splits {head_dim}":
            time_splits(workload, heads[0] // heads[1], arguments.repeats)
    workload = gram_workload((729,) * 64, 3584)
    problem = gram_problem("guard", (300, 70), width=512, dtype=torch.bfloat16, device="cuda")
    for kernel in ("forward", "backward"):
        if arguments.only in f"gram {kernel}":
            # Both kernels are held to one tile's rows by the row dots between them: only the sum compares.
            candidates = gram_candidates(arch, kernel, arguments.all)
            search(configs.GRAM, (arch, kernel), candidates, problem, workload, "both")
    return 0


def _is_right(problem) -> bool:
    return all(error.is_ok for error in measure(problem, "triton"))


if __name__ == "__main__":
    sys.exit(main())
