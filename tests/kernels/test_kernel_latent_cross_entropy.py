"""Latent cross-entropy against the equation in fp64."""

import pytest
import torch

from laver_kernels import latent_cross_entropy
from laver_kernels.testing import check, latent_problem

CASES = {
    "some rows": {"num_rows": 17, "masked": (3, 0, 11, 16)},
    "every row": {"num_rows": 5, "masked": (0, 1, 2, 3, 4)},
    "no centre": {"num_rows": 9, "masked": (2, 5), "center": False},
    "width 1": {"num_rows": 4, "masked": (1, 2), "width": 1},
    "odd width": {"num_rows": 4, "masked": (1, 2), "width": 331},
    "extreme logits": {"num_rows": 6, "masked": (0, 4), "scale": 300.0},
}


@pytest.mark.parametrize("name", CASES)
def test_cases(name, impl, device, poison):
    check(latent_problem(name, **CASES[name], device=device), impl)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit(dtype, impl, device, poison, bf16_interpreter):
    check(latent_problem("16 bit", 17, (3, 0, 11), dtype=dtype, device=device), impl)


def test_no_masked_rows_keep_a_graph(impl, device):
    student = torch.randn(5, 8, device=device, requires_grad=True)
    rows = torch.empty(0, dtype=torch.int64, device=device)
    loss = latent_cross_entropy(student, student.detach(), rows, impl=impl)
    loss.backward()
    assert loss.item() == 0
    assert student.grad.abs().max() == 0


def test_only_the_masked_rows_matter(impl, device):
    torch.manual_seed(0)
    student, teacher = torch.randn(9, 8, device=device), torch.randn(9, 8, device=device)
    rows = torch.tensor([2, 7], device=device)
    before = latent_cross_entropy(student, teacher, rows, impl=impl)
    student[3], teacher[4] = 50.0, -50.0
    assert torch.equal(before, latent_cross_entropy(student, teacher, rows, impl=impl))


def test_teacher_in_another_dtype_and_strided(impl, device):
    torch.manual_seed(0)
    wide = torch.randn(9, 32, device=device)
    teacher = torch.randn(9, 16, device=device).half()
    rows = torch.tensor([1, 8], device=device)
    got = latent_cross_entropy(wide[:, ::2], teacher, rows, impl=impl)
    torch.testing.assert_close(
        got, latent_cross_entropy(wide[:, ::2].contiguous(), teacher.float(), rows, impl=impl)
    )


def test_twenty_runs_are_bitwise_equal(impl, device, poison):
    torch.manual_seed(0)
    student, teacher = torch.randn(9, 40, device=device), torch.randn(9, 40, device=device)
    rows = torch.tensor([1, 8, 3], device=device)
    found = set()
    for _ in range(20):
        leaf = student.clone().requires_grad_()
        loss = latent_cross_entropy(leaf, teacher, rows, impl=impl)
        loss.backward()
        found.add((loss.item(), leaf.grad.cpu().numpy().tobytes()))
    assert len(found) == 1
