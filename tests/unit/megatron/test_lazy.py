"""Elements without gradient stay where they are, the others move as Adam has it."""

import pytest
import torch

from laver_mcore.megatron.lazy import keep_still

STEPS = [(0, 2), (2,), (), (0, 1), (1, 2)]
"""Rows with a gradient, step by step; row 3 never has one."""


def gradient(step):
    dense = torch.randn(4, 5, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
    mask = torch.zeros(4, 1, dtype=torch.float64)
    mask[list(STEPS[step])] = 1.0
    return (dense * mask).float()


def formula(start, betas=(0.9, 0.95), rate=0.1, eps=1e-8, decay=0.01):
    """AdamW (arXiv 1711.05101, algorithm 2) in fp64, row by row, only in the steps in which a row has a gradient."""
    rows = start.double().clone()
    first, second = torch.zeros_like(rows), torch.zeros_like(rows)
    for step, chosen in enumerate(STEPS):
        g = gradient(step).double()
        for row in chosen:
            first[row] = betas[0] * first[row] + (1 - betas[0]) * g[row]
            second[row] = betas[1] * second[row] + (1 - betas[1]) * g[row] ** 2
            m, v = first[row] / (1 - betas[0] ** (step + 1)), second[row] / (1 - betas[1] ** (step + 1))
            rows[row] = rows[row] * (1 - rate * decay) - rate * m / (v.sqrt() + eps)
    return rows, first, second


@pytest.mark.parametrize("fused", [True, False])
def test_rows_rest_in_steps_without_a_gradient(fused):
    start = torch.randn(4, 5, generator=torch.Generator().manual_seed(9))
    lazy, other = (torch.nn.Parameter(start.clone()) for _ in range(2))
    optimizer = torch.optim.AdamW([lazy, other], lr=0.1, betas=(0.9, 0.95), weight_decay=0.01, fused=fused)
    keep_still(optimizer, [lazy])
    for step in range(len(STEPS)):
        lazy.grad, other.grad = gradient(step), gradient(step)
        optimizer.step()
    wanted = formula(start)
    state = optimizer.state[lazy]
    for found, right in zip((lazy, state["exp_avg"], state["exp_avg_sq"]), wanted, strict=True):
        torch.testing.assert_close(found.detach().double(), right, rtol=1e-5, atol=1e-7)
    assert torch.equal(lazy[3], start[3])
    assert not torch.equal(other[3], start[3])  # which has weight decay as ever
    assert not torch.allclose(other[0], lazy[0], atol=1e-3)


def test_a_step_that_is_skipped_leaves_everything():
    parameter = torch.nn.Parameter(torch.ones(2, 3))
    optimizer = torch.optim.AdamW([parameter], fused=True)
    keep_still(optimizer, [parameter])
    parameter.grad = torch.ones(2, 3)
    optimizer.step()
    before = parameter.detach().clone()
    parameter.grad = torch.full((2, 3), torch.nan)
    optimizer.found_inf = torch.ones(())
    optimizer.step()
    assert torch.equal(parameter, before)
    assert torch.isfinite(optimizer.state[parameter]["exp_avg"]).all()
