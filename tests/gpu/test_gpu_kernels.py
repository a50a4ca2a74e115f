"""The compiled kernels at model shapes: the same problems and budgets as on the CPU. `pytest -m gpu`."""

import pytest
import torch

from laver_kernels import ema_update_, mixed_attention
from laver_kernels.mixed_attention.rope import rope_table
from laver_kernels.testing import (
    attention_problem,
    check,
    ema_problem,
    gram_problem,
    head_problem,
    latent_problem,
    outputs_and_gradients,
)
from laver_kernels.testing_masks import (
    MASKS,
    image,
    intervals_of,
    many_image_documents,
    one_image_documents,
    positions_of,
    text,
)

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")]

BF16 = torch.bfloat16
MIX = (
    (text(100), image(729), text(37), image(256)),
    (image(729), text(50)),
    (text(1),),
    (image(64), image(1)),
)


@pytest.mark.parametrize("dtype", [BF16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("name", MASKS)
def test_masks(name, dtype, poison):
    documents, padding = MASKS[name]
    problem = attention_problem(
        name, documents, padding=padding, heads=(4, 2), head_dim=64, dtype=dtype, device="cuda"
    )
    check(problem, "triton")


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128])
@pytest.mark.parametrize("heads", [(28, 4), (14, 2), (7, 1), (12, 2), (4, 4)], ids=str)
def test_model_shapes(heads, head_dim, poison):
    problem = attention_problem(
        "mix", MIX, padding=41, heads=heads, head_dim=head_dim, dtype=BF16, device="cuda"
    )
    check(problem, "triton")


@pytest.mark.parametrize("splits", [1, 7])
def test_both_ways_through_a_group(splits, monkeypatch, poison):
    from laver_kernels.mixed_attention import triton

    monkeypatch.setattr(triton, "head_splits", lambda programs, group, device: splits)
    check(attention_problem("mix", MIX, heads=(7, 1), head_dim=128, dtype=BF16, device="cuda"), "triton")


def test_full_precision_in_fp32():
    check(attention_problem("mix", MIX, heads=(2, 1), head_dim=128, device="cuda"), "triton")


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("lengths", [(729, 729), (1024,), (576, 1, 0, 130, 257)], ids=str)
def test_gram(lengths, clip, poison):
    check(gram_problem("latents", lengths, width=3584, clip=clip, dtype=BF16, device="cuda"), "triton")


@pytest.mark.parametrize("workspace", [1, 4 * 2**20])
def test_gram_in_waves_and_slabs(workspace, monkeypatch, poison):
    """W made again in the backward: 4 MiB hold an image of 729 tokens, 1 byte holds a row of tiles at most."""
    from laver_kernels.gram import waves

    monkeypatch.setattr(waves, "WORKSPACE_BYTES", workspace)
    lengths = (729, 1024, 130, 257)
    check(gram_problem("waves", lengths, width=3584, dtype=BF16, device="cuda"), "triton")


def test_gram_memory_is_bounded_by_its_workspace(monkeypatch):
    """One matrix over 8192 tokens would be 128 MiB in bf16."""
    from laver_kernels import gram_loss
    from laver_kernels.gram import waves

    monkeypatch.setattr(waves, "WORKSPACE_BYTES", 8 * 2**20)
    student = torch.randn(8192, 256, dtype=BF16, device="cuda", requires_grad=True)
    teacher = torch.randn(8192, 256, dtype=BF16, device="cuda")
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    gram_loss(student, teacher, (8192,), impl="triton").backward()
    assert torch.cuda.max_memory_allocated() - before < 8 * 2**20 + 4 * student.nbytes + 8192 * 64 * 4 * 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_gram_other_dtypes(dtype, poison):
    check(gram_problem("latents", (200, 77), width=1000, dtype=dtype, device="cuda"), "triton")


@pytest.mark.parametrize("scale", [1.0, 100.0])
@pytest.mark.parametrize("width", [896, 1536, 3584, 8192])
def test_latent(width, scale, poison):
    problem = latent_problem(
        "latents", 500, tuple(range(0, 500, 3)), width=width, scale=scale, dtype=BF16, device="cuda"
    )
    check(problem, "triton")


@pytest.mark.parametrize("chunk_rows", [256, 4096])
def test_head(chunk_rows, poison):
    problem = head_problem(
        "vocabulary",
        700,
        32064,
        width=896,
        vocab_size=32000,
        chunk_rows=chunk_rows,
        dtype=BF16,
        device="cuda",
    )
    check(problem, "triton")


@pytest.mark.parametrize("dtype", [BF16, torch.float32], ids=str)
def test_ema(dtype):
    check(ema_problem("weights", 10_000_019, source_dtype=dtype, device="cuda"), "triton")


def test_ema_beyond_int32():
    num_elements = 2**31 + 5000
    average = torch.zeros(num_elements, device="cuda")
    source = torch.ones(num_elements, dtype=BF16, device="cuda")
    ema_update_(average, source, 0.5, impl="triton")
    assert average.min().item() == average.max().item() == 0.5


@pytest.mark.parametrize(
    "problem",
    [
        lambda: attention_problem("mix", MIX, heads=(28, 4), head_dim=128, dtype=BF16, device="cuda"),
        lambda: gram_problem("latents", (729, 257), width=3584, dtype=BF16, device="cuda"),
        lambda: latent_problem("latents", 500, tuple(range(250)), width=3584, dtype=BF16, device="cuda"),
        lambda: head_problem("vocabulary", 700, 32064, width=896, dtype=BF16, device="cuda"),
    ],
    ids=["attention", "gram", "latent", "head"],
)
def test_twenty_runs_are_bitwise_equal(problem, poison):
    problem = problem()
    first = outputs_and_gradients(problem, problem.ours, impl="triton")
    for _ in range(19):
        again = outputs_and_gradients(problem, problem.ours, impl="triton")
        for name, tensor in first.items():
            assert torch.equal(tensor, again[name]), name


def test_compiled_by_inductor_without_graph_breaks():
    for problem in (
        attention_problem("mix", MIX, heads=(4, 2), head_dim=64, dtype=BF16, device="cuda"),
        gram_problem("latents", (200, 77), width=512, dtype=BF16, device="cuda"),
        latent_problem("latents", 50, (1, 4, 9), width=512, dtype=BF16, device="cuda"),
        head_problem("vocabulary", 70, 1000, width=64, dtype=BF16, device="cuda"),
    ):
        torch._dynamo.reset()
        compiled = torch.compile(lambda *xs, ours=problem.ours: ours(*xs, impl="triton"), fullgraph=True)
        want = outputs_and_gradients(problem, problem.ours, impl="triton")
        for name, tensor in outputs_and_gradients(problem, compiled).items():
            torch.testing.assert_close(tensor, want[name], msg=f"{problem.name} {name}")


@pytest.mark.parametrize("documents", [one_image_documents, many_image_documents])
def test_attention_memory_is_linear_in_tokens(documents):
    """At 32k tokens one [T, T] bool alone would be 1 GiB."""
    num_tokens = 32768
    packed = documents(num_tokens)
    intervals = intervals_of(packed).to("cuda")
    rope = rope_table(positions_of(packed), 128, device="cuda")
    q, k, v = (
        torch.randn(num_tokens, n, 128, dtype=BF16, device="cuda", requires_grad=True) for n in (7, 1, 1)
    )
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    mixed_attention(q, k, v, intervals, rope, impl="triton").sum().backward()
    peak = torch.cuda.max_memory_allocated() - before
    assert peak < 16 * q.nbytes
    assert intervals.row_lo_T.nbytes * 4 <= 2**20


def test_gradients_of_a_hidden_key_are_zero():
    documents = ((text(300),), (image(200),))
    intervals = intervals_of(documents, padding=100).to("cuda")
    q, k, v = (torch.randn(600, 2, 64, dtype=BF16, device="cuda", requires_grad=True) for _ in range(3))
    out = mixed_attention(q, k, v, intervals, impl="triton")
    out[:300].sum().backward()
    for x in (q, k, v):
        assert x.grad[300:].abs().max() == 0
    assert out[500:].abs().max() == 0
