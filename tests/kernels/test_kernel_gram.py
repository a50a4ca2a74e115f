"""Gram loss against the equation in fp64: clipped and plain, mixed lengths, edges."""

import pytest
import torch

from laver_kernels import gram_loss
from laver_kernels.testing import check, gram_problem

LENGTHS = {
    "one image": (40,),
    "mixed lengths": (33, 5, 64, 1, 30),
    "one token": (1,),
    "an image without tokens": (7, 0, 9),
    "equal lengths": (16, 16, 16),
}


@pytest.mark.parametrize("clip", [True, False], ids=["cga", "ga"])
@pytest.mark.parametrize("name", LENGTHS)
def test_lengths(name, clip, impl, device, poison):
    check(gram_problem(name, LENGTHS[name], clip=clip, device=device), impl)


@pytest.mark.parametrize("width", [16, 70])
def test_widths(width, impl, device, poison):
    check(gram_problem(f"width {width}", (20, 9), width=width, device=device), impl)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit(dtype, impl, device, poison, bf16_interpreter):
    check(gram_problem("16 bit", (33, 12), dtype=dtype, device=device), impl)


def test_gradcheck_away_from_the_kink():
    torch.manual_seed(0)
    student = torch.randn(9, 6, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(9, 6, dtype=torch.float64)
    for clip in (True, False):
        assert torch.autograd.gradcheck(
            lambda z, clip=clip: gram_loss(z, teacher, (4, 5), clip=clip, impl="reference"), student
        )


@pytest.mark.parametrize("clip", [True, False])
def test_equal_student_and_teacher_lose_nothing(clip, impl, device):
    z = torch.randn(20, 16, device=device)
    student = z.clone().requires_grad_()
    loss = gram_loss(student, z, (13, 7), clip=clip, impl=impl)
    loss.backward()
    assert loss.item() < 1e-10
    assert student.grad.abs().max() < 1e-5


@pytest.mark.parametrize("clip", [True, False], ids=["cga", "ga"])
def test_zero_rows_take_no_part(clip, impl, device, poison):
    """Nor does the diagonal, zero by definition: there a row that is zero in one of the two alone would show."""
    torch.manual_seed(0)
    student, teacher = torch.randn(12, 16, device=device) + 1, torch.randn(12, 16, device=device)
    student[[2, 5]] = 0
    teacher[[5, 7]] = 0
    leaf = student.clone().requires_grad_()
    loss = gram_loss(leaf, teacher, (12,), clip=clip, impl=impl)
    loss.backward()
    assert torch.isfinite(leaf.grad).all()
    assert leaf.grad[[2, 5]].abs().max() == 0
    similar = torch.nn.functional.normalize(student, dim=-1), torch.nn.functional.normalize(teacher, dim=-1)
    want = (similar[0] @ similar[0].T - similar[1] @ similar[1].T).fill_diagonal_(0)
    want = want.clamp(min=0) if clip else want
    torch.testing.assert_close(loss, want.square().sum() / 144)


def test_images_do_not_mix(impl, device):
    """Two images cost what they cost alone."""
    torch.manual_seed(0)
    student, teacher = torch.randn(30, 16, device=device), torch.randn(30, 16, device=device)
    both = gram_loss(student, teacher, (18, 12), impl=impl)
    alone = [
        gram_loss(student[s], teacher[s], (n,), impl=impl) for s, n in ((slice(18), 18), (slice(18, 30), 12))
    ]
    torch.testing.assert_close(both, sum(alone))


def test_no_images_keep_a_graph(impl, device):
    student = torch.zeros(0, 16, device=device, requires_grad=True)
    loss = gram_loss(student, student.detach(), (), impl=impl)
    loss.backward()
    assert loss.item() == 0
    assert loss.dtype == torch.float32


def test_strided_rows(impl, device):
    torch.manual_seed(0)
    wide = torch.randn(20, 64, device=device)
    teacher = torch.randn(20, 32, device=device)
    strided, dense = wide[:, ::2].requires_grad_(), wide[:, ::2].contiguous().requires_grad_()
    gradients = []
    for student in (wide[:, :32], wide[:, :32].contiguous(), strided, dense):
        leaf = student.detach().requires_grad_()
        gram_loss(leaf, teacher, (20,), impl=impl).backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(gradients[2], gradients[3], rtol=1e-6, atol=1e-8)


def test_twenty_runs_are_bitwise_equal(impl, device, poison):
    torch.manual_seed(0)
    student, teacher = torch.randn(50, 32, device=device), torch.randn(50, 32, device=device)
    found = set()
    for _ in range(20):
        leaf = student.clone().requires_grad_()
        loss = gram_loss(leaf, teacher, (37, 13), impl=impl)
        loss.backward()
        found.add((loss.item(), leaf.grad.cpu().numpy().tobytes()))
    assert len(found) == 1


WAVES = {
    # workspace bytes -> whole images in three waves; the largest image in slabs, first, last or alone
    "waves": ((40, 33, 5, 30), 8000),
    "slabs between": ((40, 100, 5), 16000),
    "slabs first": ((100, 33, 0, 1), 30000),
    "one image in slabs": ((100,), 1),
}


@pytest.mark.parametrize("clip", [True, False], ids=["cga", "ga"])
@pytest.mark.parametrize("name", WAVES)
def test_waves_through_a_bounded_workspace(name, clip, device, poison, monkeypatch):
    waves = pytest.importorskip("laver_kernels.gram.waves")
    lengths, workspace = WAVES[name]
    monkeypatch.setattr(waves, "WORKSPACE_BYTES", workspace)
    assert len(waves.split(lengths, 32, 32, workspace // 4)) > 1
    check(gram_problem(name, lengths, clip=clip, device=device), "triton")


def test_waves_cover_every_row_once():
    waves = pytest.importorskip("laver_kernels.gram.waves")
    lengths = (700, 33, 0, 5, 128, 129, 2000, 64)
    for block, rows in ((128, 128), (64, 128), (128, 64)):
        for max_elements in (1, 10_000, 300_000, 10**9):
            found = waves.split(lengths, block, rows, max_elements)
            rows_seen = [
                (slab.image, row)
                for wave in found
                for slab in wave.slabs
                for row in range(slab.first * block, min(slab.last * block, lengths[slab.image]))
            ]
            assert sorted(rows_seen) == [
                (i, row) for i, length in enumerate(lengths) for row in range(length)
            ]
            for wave in found:
                smallest = max(block, rows) * max(waves.w_stride(lengths[slab.image]) for slab in wave.slabs)
                assert wave.w_elements <= max(max_elements, smallest)
                assert all(slab.first * block % rows == 0 for slab in wave.slabs)
                assert wave.is_whole or len(wave.slabs) == 1
