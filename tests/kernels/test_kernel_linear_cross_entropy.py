"""LM head and next-token loss against the equation in fp64, alone and over tensor-parallel ranks."""

import gc

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from laver_kernels import linear_cross_entropy
from laver_kernels.testing import check, head_problem

CASES = {
    "one chunk": {"num_rows": 9, "num_columns": 50},
    "chunks": {"num_rows": 19, "num_columns": 50, "chunk_rows": 6},
    "padded vocabulary": {"num_rows": 7, "num_columns": 64, "vocab_size": 50},
    "one row": {"num_rows": 1, "num_columns": 33},
    "more columns than a step": {"num_rows": 3, "num_columns": 4500},
}


@pytest.mark.parametrize("name", CASES)
def test_cases(name, impl, device, poison):
    check(head_problem(name, **CASES[name], device=device), impl)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit(dtype, impl, device, poison, bf16_interpreter):
    check(head_problem("16 bit", 19, 50, chunk_rows=8, dtype=dtype, device=device), impl)


@pytest.mark.parametrize("chunk_rows", [4, 16])
def test_a_weight_known_beforehand_is_in_the_loss_and_its_gradients(chunk_rows, impl, device, poison):
    torch.manual_seed(0)
    hidden, weight = torch.randn(9, 16, device=device), torch.randn(50, 16, device=device)
    targets, factor = torch.randint(0, 50, (9,), device=device), torch.tensor(0.375, device=device)
    leaves = [x.clone().requires_grad_() for x in (hidden, weight)]
    loss = linear_cross_entropy(*leaves, targets, loss_weight=factor, chunk_rows=chunk_rows, impl=impl)
    loss.backward()
    plain = [x.double().requires_grad_() for x in (hidden, weight)]
    want = 0.375 * torch.nn.functional.cross_entropy(plain[0] @ plain[1].T, targets, reduction="sum")
    want.backward()
    torch.testing.assert_close(loss.double(), want, rtol=1e-6, atol=0)
    for got, leaf in zip(leaves, plain, strict=True):
        torch.testing.assert_close(got.grad.double(), leaf.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU the assertion ends the process")
def test_a_weighted_loss_that_is_multiplied_again_is_an_error(device):
    pytest.importorskip("triton")
    hidden, weight = torch.randn(3, 16, requires_grad=True), torch.randn(20, 16, requires_grad=True)
    targets, factor = torch.zeros(3, dtype=torch.int64), torch.tensor(0.5)
    loss = linear_cross_entropy(hidden, weight, targets, loss_weight=factor, impl="triton")
    with pytest.raises(RuntimeError, match="with loss_weight the loss's gradient has to be 1"):
        (2 * loss).backward()


def test_no_rows_keep_a_graph(impl, device):
    hidden = torch.zeros(0, 8, device=device, requires_grad=True)
    weight = torch.randn(20, 8, device=device, requires_grad=True)
    targets = torch.empty(0, dtype=torch.int64, device=device)
    loss = linear_cross_entropy(hidden, weight, targets, impl=impl)
    loss.backward()
    assert loss.item() == 0
    assert weight.grad.abs().max() == 0
    assert hidden.grad.shape == hidden.shape


def test_strided_hidden_and_frozen_weight(impl, device):
    torch.manual_seed(0)
    wide = torch.randn(9, 32, device=device)
    weight = torch.randn(20, 16, device=device)
    targets = torch.randint(0, 20, (9,), device=device)
    found = []
    for hidden in (wide[:, ::2], wide[:, ::2].contiguous()):
        leaf = hidden.detach().requires_grad_()
        loss = linear_cross_entropy(leaf, weight, targets, impl=impl)
        loss.backward()
        found.append((loss.item(), leaf.grad))
    assert found[0][0] == pytest.approx(found[1][0])
    torch.testing.assert_close(found[0][1], found[1][1])


def test_twenty_runs_are_bitwise_equal(impl, device, poison):
    torch.manual_seed(0)
    hidden, weight = torch.randn(9, 16, device=device), torch.randn(50, 16, device=device)
    targets = torch.randint(0, 50, (9,), device=device)
    found = set()
    for _ in range(20):
        leaves = [x.clone().requires_grad_() for x in (hidden, weight)]
        loss = linear_cross_entropy(*leaves, targets, chunk_rows=4, impl=impl)
        loss.backward()
        found.add((loss.item(), *(x.grad.cpu().numpy().tobytes() for x in leaves)))
    assert len(found) == 1


def _tensor_parallel_rank(rank: int, meeting: str) -> None:
    torch.set_num_threads(1)
    # A file and no port: nobody else can take it, and no rank is the server that the other still asks at its end.
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    _compare_with_one_rank(rank)
    # The graphs above refer to the group: they are gone before it is, and no rank leaves while another needs it.
    gc.collect()
    dist.barrier()
    dist.destroy_process_group()


def _compare_with_one_rank(rank: int) -> None:
    """Two ranks hold 24 columns each of 42 real ones: the second rank's shard ends in padding."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(11, 16), torch.randn(48, 16)
    targets = torch.randint(0, 42, (11,))
    whole = [x.double().requires_grad_() for x in (hidden, weight)]
    want = linear_cross_entropy(*whole, targets, vocab_size=42, impl="reference")
    want.backward()
    mine = slice(24 * rank, 24 * rank + 24)
    shard = {"tp_group": dist.group.WORLD, "vocab_start": 24 * rank, "vocab_size": 42}
    implementations = ["reference"] if not _has_triton() else ["reference", "triton"]
    for impl in implementations:
        leaves = [hidden.clone().requires_grad_(), weight[mine].clone().requires_grad_()]
        loss = linear_cross_entropy(*leaves, targets, chunk_rows=4, impl=impl, **shard)
        (loss * 2).backward()
        torch.testing.assert_close(loss.double(), want.detach(), rtol=1e-6, atol=0)
        torch.testing.assert_close(leaves[0].grad.double(), 2 * whole[0].grad, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(leaves[1].grad.double(), 2 * whole[1].grad[mine], rtol=1e-4, atol=1e-5)
    nothing = linear_cross_entropy(hidden[:0], weight[mine], targets[:0], tp_group=dist.group.WORLD)
    assert nothing.item() == 0


def _has_triton() -> bool:
    import importlib.util

    return importlib.util.find_spec("triton") is not None


@pytest.mark.skipif(torch.cuda.is_available(), reason="gloo ranks on CPU tensors, interpreted")
def test_tensor_parallel_ranks_agree_with_one(tmp_path):
    multiprocessing.spawn(_tensor_parallel_rank, args=(str(tmp_path / "meeting"),), nprocs=2)
