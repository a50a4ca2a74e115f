"""The registered operators: schemas and fakes, torch.compile, autocast, activation recompute, memory."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from laver_kernels import (
    ema_update_,
    gram_loss,
    latent_cross_entropy,
    linear_cross_entropy,
    mixed_attention,
    rope_table,
)
from laver_kernels.testing_masks import image, intervals_of, positions_of, text

pytest.importorskip("triton")
DOCUMENTS = ((text(5), image(9)), (image(4), text(3)))


def _attention(device, dtype=torch.float32):
    torch.manual_seed(0)
    intervals = intervals_of(DOCUMENTS, 2).to(device)
    rope = rope_table(positions_of(DOCUMENTS, 2), 16, device=device)
    q, k, v = (torch.randn(len(intervals), n, 16, device=device, dtype=dtype) for n in (4, 2, 2))
    return [q, k, v], lambda q, k, v: mixed_attention(q, k, v, intervals, rope, impl="triton")


def _gram(device):
    torch.manual_seed(0)
    teacher = torch.randn(20, 16, device=device)
    return [torch.randn(20, 16, device=device)], lambda z: gram_loss(z, teacher, (12, 8), impl="triton")


def _latent(device):
    torch.manual_seed(0)
    teacher, rows = torch.randn(20, 16, device=device), torch.tensor([3, 9], device=device)
    center = torch.randn(16, device=device)

    def call(z):
        return latent_cross_entropy(z, teacher, rows, center_K=center, impl="triton")

    return [torch.randn(20, 16, device=device)], call


def _head(device):
    torch.manual_seed(0)
    targets = torch.randint(0, 30, (9,), device=device)
    inputs = [torch.randn(9, 16, device=device), torch.randn(30, 16, device=device)]
    return inputs, lambda h, w: linear_cross_entropy(h, w, targets, chunk_rows=4, impl="triton")


OPERATIONS = {"attention": _attention, "gram": _gram, "latent": _latent, "head": _head}


def _run(inputs, call):
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out = call(*leaves)
    return [out.detach(), *torch.autograd.grad(out.sum(), leaves)]


@pytest.mark.parametrize("name", OPERATIONS)
def test_compile_without_graph_breaks(name, device):
    inputs, call = OPERATIONS[name](device)
    torch._dynamo.reset()
    compiled = _run(inputs, torch.compile(call, backend="aot_eager", fullgraph=True))
    for got, want in zip(compiled, _run(inputs, call), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0)


def test_compile_with_other_image_lengths(device):
    """A second tuple of lengths makes torch.compile think of them as symbols; the tile lists are for numbers."""
    teacher = torch.randn(20, 16, device=device)

    def call(z, first, second):
        return gram_loss(z, teacher, (first, second), impl="triton")

    torch._dynamo.reset()
    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    z = torch.randn(20, 16, device=device)
    for lengths in ((12, 8), (10, 10), (3, 17)):
        torch.testing.assert_close(compiled(z, *lengths), call(z, *lengths), rtol=0, atol=0)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("name", OPERATIONS)
def test_activation_recompute(name, use_reentrant, device):
    inputs, call = OPERATIONS[name](device)

    def again(*xs):
        return checkpoint(call, *xs, use_reentrant=use_reentrant)

    if use_reentrant:  # it knows no autograd.grad
        leaves = [x.detach().clone().requires_grad_() for x in inputs]
        out = again(*leaves)
        out.sum().backward()
        recomputed = [out.detach(), *(leaf.grad for leaf in leaves)]
    else:
        recomputed = _run(inputs, again)
    for got, want in zip(recomputed, _run(inputs, call), strict=True):
        assert torch.equal(got, want)


def test_autocast_casts_attention_and_head_and_leaves_the_losses(device, bf16_interpreter):
    with torch.autocast(device, dtype=torch.bfloat16):
        inputs, call = _attention(device)
        out, *gradients = _run(inputs, call)
        assert out.dtype == torch.bfloat16
        assert all(g.dtype == torch.float32 for g in gradients)
        for name in ("gram", "latent", "head"):
            loss, *gradients = _run(*OPERATIONS[name](device))
            assert loss.dtype == torch.float32
            assert all(g.dtype == torch.float32 for g in gradients)
    for name in ("gram", "latent"):
        with torch.autocast(device, dtype=torch.bfloat16):
            inside = _run(*OPERATIONS[name](device))
        for got, want in zip(inside, _run(*OPERATIONS[name](device)), strict=True):
            assert torch.equal(got, want)


def test_operator_registrations(device, monkeypatch):
    """Schema, fake tensors, autograd registration and AOT dispatch, by PyTorch's own checker."""
    from laver_kernels.ema import triton as ema
    from laver_kernels.gram import triton as gram
    from laver_kernels.gram import waves
    from laver_kernels.latent_cross_entropy import triton as latent
    from laver_kernels.linear_cross_entropy import triton as head
    from laver_kernels.mixed_attention import triton as attention

    def leaf(*shape):
        return torch.randn(*shape, device=device, requires_grad=True)

    intervals = intervals_of(DOCUMENTS, 2).to(device)
    bounds = (intervals.row_lo_T, intervals.row_hi_T, intervals.col_lo_T, intervals.col_hi_T)
    cos, sin = rope_table(positions_of(DOCUMENTS, 2), 16, device=device)
    num_tokens = len(intervals)
    q, k, v = leaf(num_tokens, 2, 16), leaf(num_tokens, 1, 16), leaf(num_tokens, 1, 16)
    opcheck = torch.library.opcheck
    opcheck(attention.forward_op, (q, k, v, *bounds, cos, sin, 0.25))
    opcheck(attention.forward_op, (q, k, v, *bounds, None, None, 0.25))
    for workspace in (waves.WORKSPACE_BYTES, 1200):
        monkeypatch.setattr(waves, "WORKSPACE_BYTES", workspace)
        opcheck(gram.forward_op, (leaf(20, 16), torch.randn(20, 16, device=device), [12, 8], True, True))
    rows = torch.tensor([3, 9], device=device)
    opcheck(
        latent.forward_op, (leaf(20, 16), torch.randn(20, 16, device=device), rows, None, 0.1, 0.04, True)
    )
    targets = torch.randint(0, 30, (9,), device=device)
    opcheck(head.forward_op, (leaf(9, 16), leaf(30, 16), targets, None, "", 0, 30, 4, True, True))
    average, copy = torch.randn(50, device=device), torch.zeros(50, device=device)
    opcheck(ema.update_op, (average, torch.randn(50, device=device), None, 0.9, copy))
    opcheck(
        ema.update_op, (average, torch.randn(50, device=device), torch.tensor(0.9, device=device), 0.0, None)
    )


def test_ema_compiles(device):
    average, source = torch.zeros(20, device=device), torch.ones(20, device=device)
    torch._dynamo.reset()
    torch.compile(lambda a, s: ema_update_(a, s, 0.5, impl="triton"), backend="aot_eager")(average, source)
    assert torch.equal(average, torch.full_like(average, 0.5))


def _largest_allocation(function) -> int:
    """Bytes of the largest single allocation, seen by the profiler inside the operators too."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        function()
    return max(_allocations(profile.profiler.kineto_results.experimental_event_tree()))


def _allocations(nodes):
    for node in nodes:
        if node.name == "[memory]":
            yield node.extra_fields.alloc_size
        yield from _allocations(node.children)


@pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu reads the allocator's peak instead")
def test_no_quadratic_memory(monkeypatch):
    num_tokens = 384
    documents = ((text(64), image(256), text(64)),)
    intervals = intervals_of(documents)
    qkv = [torch.randn(num_tokens, 1, 16) for _ in range(3)]
    largest = _largest_allocation(
        lambda: _run(qkv, lambda q, k, v: mixed_attention(q, k, v, intervals, impl="triton"))
    )
    assert 0 < largest <= num_tokens * 16 * 4 < num_tokens**2

    # Gram: one n x n matrix per image in the inputs' dtype, never one over all images' tokens.
    lengths, width = (16,) * 12, 16
    student, teacher = torch.randn(192, width), torch.randn(192, width)
    largest = _largest_allocation(
        lambda: _run([student], lambda z: gram_loss(z, teacher, lengths, impl="triton"))
    )
    assert 0 < largest <= sum(n * n for n in lengths) * 4 < 192**2 * 4

    # With a smaller workspace: the gradient, or one wave's W, however many images there are.
    monkeypatch.setattr("laver_kernels.gram.waves.WORKSPACE_BYTES", 2 * 16 * 16 * 4)
    student, teacher, lengths = torch.randn(1600, 16), torch.randn(1600, 16), (16,) * 100
    largest = _largest_allocation(
        lambda: _run([student], lambda z: gram_loss(z, teacher, lengths, impl="triton"))
    )
    assert 0 < largest <= student.nbytes < sum(n * n for n in lengths) * 4 * 2
    # One image in slabs of row blocks: never n x n.
    student, teacher = torch.randn(300, 16), torch.randn(300, 16)
    largest = _largest_allocation(
        lambda: _run([student], lambda z: gram_loss(z, teacher, (300,), impl="triton"))
    )
    assert 0 < largest <= 32 * 304 * 4 < 300 * 300 * 4

    # Head: at most chunk_rows rows of logits, or the gradient of the weight.
    hidden, weight, targets = torch.randn(64, 8), torch.randn(300, 8), torch.randint(0, 300, (64,))
    largest = _largest_allocation(
        lambda: _run(
            [hidden, weight], lambda h, w: linear_cross_entropy(h, w, targets, chunk_rows=8, impl="triton")
        )
    )
    assert 0 < largest <= 300 * 8 * 4 < 64 * 300 * 4
