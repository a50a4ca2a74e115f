"""EMA update: the equation, its copy, and a thousand steps without drift."""

import pytest
import torch

from laver_kernels import ema_update_
from laver_kernels.testing import check, ema_problem


@pytest.mark.parametrize("num_elements", [1, 100, 4096, 5001])
@pytest.mark.parametrize("source_dtype", [torch.float32, torch.bfloat16])
def test_update(num_elements, source_dtype, impl, device, bf16_interpreter):
    check(ema_problem(f"{num_elements}", num_elements, source_dtype=source_dtype, device=device), impl)


@pytest.mark.parametrize(
    "momentum", [0.0, 0.9, 1.0, torch.tensor(0.9), torch.tensor([0.9], dtype=torch.float64)]
)
def test_momentum(momentum, impl, device):
    average, source = torch.zeros(7, device=device), torch.ones(7, device=device)
    ema_update_(average, source, momentum, impl=impl)
    torch.testing.assert_close(average, torch.full_like(average, 1 - float(momentum)))


def test_copy_is_the_rounded_average(impl, device, bf16_interpreter):
    torch.manual_seed(0)
    average, source = torch.randn(300, device=device), torch.randn(300, device=device)
    copy = torch.zeros(300, dtype=torch.bfloat16, device=device)
    ema_update_(average, source, 0.7, copy, impl=impl)
    assert torch.equal(copy, average.bfloat16())


def test_a_thousand_steps_cover_the_distance(impl, device, bf16_interpreter):
    """98 % of the way at momentum 0.996; a bf16 average would stand still (1.3 %)."""
    torch.manual_seed(0)
    num_steps = 100 if impl == "triton" and device == "cpu" else 1000  # the interpreter takes 15 ms a step
    average = torch.randn(64, device=device).bfloat16().float()
    target = (average * (1 + 0.05 * torch.randn(64, device=device))).bfloat16()
    before = (average - target).norm()
    exact = average.double()
    for _ in range(num_steps):
        ema_update_(average, target, 0.996, impl=impl)
        exact += 0.004 * (target.double() - exact)
    torch.testing.assert_close(
        ((average - target).norm() / before).item(), 0.996**num_steps, rtol=1e-3, atol=0
    )
    torch.testing.assert_close(average, exact.float(), rtol=1e-5, atol=1e-6)


def test_shapes_layouts_and_empty_shards(impl, device):
    matrix, source = torch.zeros(4, 6, device=device), torch.ones(4, 6, device=device)
    ema_update_(matrix.t(), source.t(), 0.5, impl=impl)
    assert torch.equal(matrix, torch.full_like(matrix, 0.5))
    base = torch.zeros(10, device=device)
    ema_update_(base[::2], torch.ones(5, device=device), 0.5, impl=impl)
    assert torch.equal(base, torch.tensor([0.5, 0.0] * 5, device=device))
    ema_update_(base[:0], base[:0], 0.5, impl=impl)


def test_source_that_requires_gradients(impl, device):
    average, source = torch.zeros(5, device=device), torch.ones(5, device=device, requires_grad=True)
    ema_update_(average, source, 0.5, impl=impl)
    assert not average.requires_grad
