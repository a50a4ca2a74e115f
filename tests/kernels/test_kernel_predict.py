"""Predictions of whole cases: steps against a dense mask, programs on places, and the file that is kept."""

import json
import os
import subprocess
import sys

import pytest
import torch
from long import LONG

from laver_kernels.testing_masks import MASKS, intervals_of


@pytest.fixture
def predict(modules):
    import predict

    yield predict
    sys.modules.pop("predict", None)


def _brute(seen: torch.Tensor, step: int) -> tuple[int, int, int]:
    """Steps of one tile from its rows of a dense mask: from the first that shows anything to the last."""
    pieces = seen.split(step, 1)
    shown = [i for i, piece in enumerate(pieces) if piece.any()]
    if not shown:
        return 0, 0, 0
    visited = range(shown[0], shown[-1] + 1)
    full = [i for i in visited if pieces[i].shape[1] == step and pieces[i].all()]
    if not full:
        return len(visited), 0, 0
    return full[0] - visited[0], len(full), visited[-1] - full[-1]


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize(("tile", "step"), [(16, 8), (8, 16), (4, 4)])
def test_steps_of_every_tile(predict, name, tile, step):
    documents, padding = MASKS[name]
    mask = intervals_of(documents, padding)
    row, num_tokens = torch.arange(len(mask)), len(mask)
    dense = (row >= mask.row_lo_T[:, None]) & (row < mask.row_hi_T[:, None])
    for lo, hi, seen in ((mask.row_lo_T, mask.row_hi_T, dense), (mask.col_lo_T, mask.col_hi_T, dense.T)):
        got = predict.steps_of(lo, hi, num_tokens, tile, step)
        want = [_brute(rows, step) for rows in seen.split(tile)]
        assert got.sum(1).tolist() == [sum(each) for each in want]
        # A tile with a row that sees nothing has no step without a mask, whatever its other rows see.
        assert got.tolist() == [list(each) for each in want]


@pytest.mark.parametrize(
    ("durations", "places", "want"),
    [([3, 1, 1, 1], 2, 3), ([1, 1, 1, 3], 2, 4), ([2, 2, 2], 1, 6), ([5, 4], 8, 5), ([], 3, 0)],
    ids=["long one first", "long one last", "one place", "places to spare", "nothing"],
)
def test_programs_begin_where_a_place_is_free_first(predict, durations, places, want):
    assert predict.makespan(durations, places) == want


def test_a_case_by_hand(predict):
    """Causal, four tiles of 128 rows and one head: 1 to 4 steps of 1000 cycles, the last of them masked (1500)."""
    kernel = predict.Kernel(phases=(1500.0, 1000.0, 1500.0), around=100.0, programs=1, step=128, tile=128)
    row = torch.arange(512, dtype=torch.int32)
    steps = predict.steps_of(torch.zeros_like(row), row + 1, 512, 128, 128)
    assert steps.tolist() == [[1, 0, 0], [0, 1, 1], [0, 2, 1], [0, 3, 1]]
    assert predict.cycles_of(kernel, steps, 1, 1, "sm_80") == 3 * 1000 + 1500 + 100
    assert predict.cycles_of(kernel, steps, 1, 2, "sm_80") == 2 * (3 * 1000 + 1500) + 100
    # 108 places: one head more than they hold waits for the first that ends.
    assert predict.cycles_of(kernel, steps[:1], 109, 1, "sm_80") == 2 * (1500 + 100)


def test_what_is_kept_covers_the_cases_that_are_timed(predict, modules):
    kept = json.loads(predict.PREDICTIONS.read_text())
    assert set(kept) == set(predict.MULTIPROCESSORS)
    timed = {
        f"mixed_attention, {benchmark.case}, {direction}"
        for benchmark in modules.registry.attention_benchmarks()
        for direction in ("forward", "backward")
        if "RoPE" not in benchmark.case
    }
    for shares in kept.values():
        assert set(shares) == timed
        assert all(0.2 < share < 0.9 for share in shares.values())


@LONG
def test_what_is_kept_is_what_the_model_predicts(predict, request):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(request.config.rootpath / "kernels")
    command = [sys.executable, predict.__file__]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=True)
    kept = json.loads(predict.PREDICTIONS.read_text())
    for line in done.stdout.splitlines():
        arch, share, name = line.split("  ", 2)
        assert float(share) == pytest.approx(kept[arch][name], abs=0.02), line
