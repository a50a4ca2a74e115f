"""Programs of one launch in any order: every result is bitwise what it is in order, and nothing is left unwritten.

The interpreter runs programs one after another, where a GPU runs them at once and in no order. A program that
read what another of its launch writes, or a sum whose order depends on who comes first, would show here.
"""

import random

import pytest
import torch

from laver_kernels.testing import (
    attention_problem,
    gram_problem,
    head_problem,
    latent_problem,
    outputs_and_gradients,
)
from laver_kernels.testing_masks import image, text

interpreter = pytest.importorskip("triton.runtime.interpreter")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU has an order of its own")

DOCUMENTS = ((text(20), image(40)), (image(16), text(10)))
PROBLEMS = {
    "attention": lambda: attention_problem("order", DOCUMENTS, padding=9, heads=(2, 1)),
    "gram": lambda: gram_problem("order", (70, 5, 33)),
    "latent": lambda: latent_problem("order", 40, tuple(range(0, 40, 3))),
    "head": lambda: head_problem("order", 9, 4500, chunk_rows=4),
}


def _shuffle(monkeypatch, seed: int) -> list[tuple[int, int, int]]:
    """Sends every launch's programs through a permutation of its grid; returns the places as they ran."""
    builder = interpreter.InterpreterBuilder
    place, ran, order = builder.set_grid_idx, [], []
    numbers = random.Random(seed)

    def place_elsewhere(self, x, y, z):
        columns, depth = self.grid_dim[1:]
        number = (x * columns + y) * depth + z
        if number == 0:
            order[:] = range(self.grid_dim[0] * columns * depth)
            numbers.shuffle(order)
        other = order[number]
        ran.append((other // (columns * depth), other // depth % columns, other % depth))
        place(self, *ran[-1])

    monkeypatch.setattr(builder, "set_grid_idx", place_elsewhere)
    return ran


@pytest.mark.parametrize("name", PROBLEMS)
def test_programs_run_in_any_order(name, monkeypatch, poison):
    problem = PROBLEMS[name]()
    want = outputs_and_gradients(problem, problem.ours, impl="triton")
    for seed in range(2):
        with monkeypatch.context() as patch:
            ran = _shuffle(patch, seed)
            found = outputs_and_gradients(problem, problem.ours, impl="triton")
        assert ran != sorted(ran)
        for quantity, tensor in want.items():
            assert torch.equal(found[quantity], tensor), quantity


def test_gram_waves_run_in_any_order(monkeypatch, poison):
    """W made again wave after wave and in slabs, through memory that the next launch overwrites."""
    waves = pytest.importorskip("laver_kernels.gram.waves")
    monkeypatch.setattr(waves, "WORKSPACE_BYTES", 16000)
    problem = gram_problem("order", (40, 100, 5))
    want = outputs_and_gradients(problem, problem.ours, impl="triton")
    _shuffle(monkeypatch, 0)
    for quantity, tensor in outputs_and_gradients(problem, problem.ours, impl="triton").items():
        assert torch.equal(tensor, want[quantity]), quantity
