"""Mixed attention against the dense equation in fp64: odd masks, heads, dimensions, dtypes, layouts."""

import pytest
import torch

from laver_kernels import configs, mixed_attention, rope_table
from laver_kernels.launch import specialises
from laver_kernels.testing import attention_problem, check, outputs_and_gradients
from laver_kernels.testing_masks import MASKS, image, intervals_of, positions_of, text

SMALL = ((text(9), image(12), text(5)), (image(6), text(8)))


@pytest.mark.parametrize("name", MASKS)
def test_masks(name, impl, device, poison):
    documents, padding = MASKS[name]
    check(attention_problem(name, documents, padding=padding, device=device), impl)


@pytest.mark.parametrize(
    ("heads", "head_dim"),
    [
        ((28, 4), 16),
        ((7, 1), 16),
        ((3, 3), 16),
        ((2, 1), 64),
        ((1, 1), 80),
        ((1, 1), 96),
        ((1, 1), 128),
        ((1, 1), 10),
    ],
    ids=lambda value: "x".join(map(str, value)) if isinstance(value, tuple) else f"d{value}",
)
def test_heads_and_dimensions(heads, head_dim, impl, device, poison):
    rotate = head_dim % 4 == 0
    problem = attention_problem(
        "heads", SMALL, padding=3, heads=heads, head_dim=head_dim, device=device, rotate=rotate
    )
    check(problem, impl)


def test_without_rotation(impl, device, poison):
    check(attention_problem("no rotation", SMALL, device=device, rotate=False), impl)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit(dtype, impl, device, poison, bf16_interpreter):
    check(attention_problem("16 bit", SMALL, padding=5, heads=(4, 2), dtype=dtype, device=device), impl)


@pytest.mark.parametrize("name", ["adjacent images", "padding tail", "documents of every size"])
def test_the_specialised_kernel(name, device, poison, monkeypatch):
    """The warp-specialised forward, whose loop the interpreter runs as any other, and the backward after it."""
    triton = pytest.importorskip("laver_kernels.mixed_attention.triton")
    if device == "cuda" and not triton.specialises(torch.device(device)):
        pytest.skip("not sm_90, or a Triton that does not specialise")
    seen, launch = [], triton.launch
    monkeypatch.setattr(
        triton, "launch", lambda kernel, *more, **named: seen.append(kernel) or launch(kernel, *more, **named)
    )
    monkeypatch.setattr(triton, "specialises", lambda device: True)
    monkeypatch.setattr(
        triton,
        "SPECIALISED_TILE",
        configs.ATTENTION_INTERPRETER if device == "cpu" else configs.SPECIALISED_TILE,
    )
    documents, padding = MASKS[name]
    problem = attention_problem(
        name, documents, padding=padding, heads=(2, 1), head_dim=128, dtype=torch.float16, device=device
    )
    check(problem, "triton")
    assert triton.attention_forward_specialised in seen


@pytest.mark.parametrize(
    ("version", "capability", "switch", "want"),
    [
        ("3.6.0", (9, 0), None, True),
        ("3.9.1", (9, 0), "1", True),
        ("3.5.1", (9, 0), None, False),
        ("3.10.0", (9, 0), None, False),
        ("3.7.1", (8, 0), None, False),
        ("3.7.1", (10, 0), None, False),
        ("3.7.1", (9, 0), "0", False),
    ],
)
def test_where_warps_are_specialised(version, capability, switch, want, monkeypatch):
    triton = pytest.importorskip("triton")
    monkeypatch.setattr(triton, "__version__", version)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.delenv("LAVER_WARP_SPECIALISE", raising=False)
    if switch is not None:
        monkeypatch.setenv("LAVER_WARP_SPECIALISE", switch)
    assert specialises.__wrapped__(torch.device("cuda")) is want
    assert not specialises.__wrapped__(torch.device("cpu"))


def test_fp64_reference(device):
    check(attention_problem("fp64", SMALL, padding=5, dtype=torch.float64, device=device), "reference")


def test_strided_views_of_a_fused_projection(impl, device, poison):
    intervals, rope, qkv = _fused(device)
    split = (4, 2, 2)
    strided = mixed_attention(*qkv.split(split, dim=1), intervals, rope, impl=impl)
    dense = mixed_attention(*(x.contiguous() for x in qkv.split(split, dim=1)), intervals, rope, impl=impl)
    assert torch.equal(strided, dense)
    transposed = qkv.permute(2, 0, 1).contiguous().permute(1, 2, 0)  # last dimension strided
    assert torch.equal(mixed_attention(*transposed.split(split, dim=1), intervals, rope, impl=impl), dense)


def test_a_hidden_key_changes_nothing(impl, device):
    intervals, rope, qkv = _fused(device)
    q, k, v = qkv.split((4, 2, 2), dim=1)
    before = mixed_attention(q, k, v, intervals, rope, impl=impl)
    other_k, other_v = k.clone(), v.clone()
    other_k[20], other_v[20] = 7.0, -9.0  # a text token: rows before it and other documents do not see it
    after = mixed_attention(q, other_k, other_v, intervals, rope, impl=impl)
    sees = (intervals.row_lo_T <= 20) & (intervals.row_hi_T > 20)
    assert torch.equal(before[~sees], after[~sees])
    assert (before[sees] != after[sees]).any(-1).all()


def test_twenty_runs_are_bitwise_equal(impl, device, poison):
    problem = attention_problem("repeat", ((text(9), image(26)),), padding=2, device=device)
    first = outputs_and_gradients(problem, problem.ours, impl=impl)
    for _ in range(19):
        for name, again in outputs_and_gradients(problem, problem.ours, impl=impl).items():
            assert torch.equal(again, first[name]), name


def test_heads_of_a_group_in_one_program(device, monkeypatch, poison):
    """The long-sequence path: no partial gradients per head."""
    triton = pytest.importorskip("laver_kernels.mixed_attention.triton")
    monkeypatch.setattr(triton, "head_splits", lambda programs, group, device: 1)
    check(attention_problem("one program", SMALL, heads=(4, 2), device=device), "triton")


def test_offsets_beyond_int32(device):
    """Rows 2^23 elements apart: the last starts past element 2^31. Only the touched pages exist."""
    pytest.importorskip("triton")
    num_tokens, stride, head_dim = 270, 2**23 - 16, 16
    storage = torch.empty(num_tokens * stride, dtype=torch.float16, device=device)
    q_THD = storage.as_strided((num_tokens, 1, head_dim), (stride, head_dim, 1))
    q_THD.copy_(torch.randn(num_tokens, 1, head_dim))
    assert (num_tokens - 1) * stride > 2**31
    intervals = intervals_of(((image(20), text(250)),)).to(device)
    dense = q_THD.clone()
    got = mixed_attention(q_THD, dense, dense, intervals, impl="triton")
    assert torch.equal(got, mixed_attention(dense, dense, dense, intervals, impl="triton"))


def test_no_tokens(impl, device):
    empty = torch.zeros(0, 2, 16, device=device, requires_grad=True)
    out = mixed_attention(empty, empty, empty, intervals_of(()).to(device), impl=impl)
    out.sum().backward()
    assert out.shape == empty.grad.shape


def _fused(device):
    torch.manual_seed(0)
    intervals = intervals_of(SMALL, 2).to(device)
    rope = rope_table(positions_of(SMALL, 2), 16, device=device)
    return intervals, rope, torch.randn(len(intervals), 8, 16, device=device)
