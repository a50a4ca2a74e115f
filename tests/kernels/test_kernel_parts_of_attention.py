"""Fewer queries than keys, log-sum-exps, parts joined to a whole, and the batched layout, against fp64."""

import itertools

import pytest
import torch

from laver_kernels import Intervals, merge_attention, mixed_attention, rope_table, rotate
from laver_kernels.mixed_attention.reference import attention
from laver_kernels.testing import Problem, check
from laver_kernels.testing_masks import MASKS, dense_mask, image, intervals_of, text

DOCUMENTS = ((text(9), image(12), text(5)), (image(6), text(8)))  # 40 tokens
# name -> rows and keys of one call, out of the 40 tokens and 3 of padding.
PARTS = {
    "one new token": ((25, 26), (0, 26)),
    "several new tokens": ((20, 40), (0, 40)),
    "more rows than keys": ((0, 43), (0, 7)),
    "rows that see none of the keys": ((0, 20), (30, 43)),
    "padding alone": ((40, 43), (0, 43)),
    "a tile and one": ((7, 40), (7, 40)),
}


def _random(seed, *shape, dtype=torch.float32, device="cpu"):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def part_problem(rows, keys, device, **more):
    """Some rows of the mask over some of its keys, neither rotated inside."""
    intervals = intervals_of(DOCUMENTS, 3).to(device).part(rows, keys)
    mask = dense_mask(DOCUMENTS, 3)[slice(*rows), slice(*keys)].to(device)
    sizes = {"q": (rows, 4), "k": (keys, 2), "v": (keys, 2)}
    inputs = {
        name: _random(seed, span[1] - span[0], heads, 16, device=device, **more)
        for seed, (name, (span, heads)) in enumerate(sizes.items())
    }
    return Problem(
        name=f"rows {rows}, keys {keys}",
        inputs=inputs,
        ours=lambda q, k, v, impl: mixed_attention(q, k, v, intervals, impl=impl),
        plain=lambda q, k, v: attention(q, k, v, mask, None, 0.25),
    )


@pytest.mark.parametrize("name", PARTS)
def test_queries_and_keys_of_different_number(name, impl, device, poison):
    problem = part_problem(*PARTS[name], device)
    check(problem, impl)


@pytest.mark.parametrize("name", PARTS)
def test_a_part_is_that_part_of_the_dense_mask(name):
    rows, keys = PARTS[name]
    part = intervals_of(DOCUMENTS, 3).part(rows, keys)
    part.validate()
    derived = Intervals.from_rows(part.row_lo_T, part.row_hi_T, num_keys=part.num_keys)
    want = dense_mask(DOCUMENTS, 3)[slice(*rows), slice(*keys)]
    for mask in (part, derived):
        row, column = torch.arange(len(mask)), torch.arange(mask.num_keys)
        by_rows = (column >= mask.row_lo_T[:, None]) & (column < mask.row_hi_T[:, None])
        by_columns = (row[:, None] >= mask.col_lo_T) & (row[:, None] < mask.col_hi_T)
        assert torch.equal(by_rows, want)
        assert torch.equal(by_columns & (mask.row_lo_T < mask.row_hi_T)[:, None], want)


def plain_lse(q, k, mask, scale):
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    score = scale * torch.einsum("ihd,jhd->hij", q, k)
    return score.masked_fill(~mask, -float("inf")).logsumexp(-1)


@pytest.mark.parametrize("name", ["adjacent images", "padding tail", "reconstruction", "one token"])
def test_log_sum_exps_and_their_gradients(name, impl, device, poison):
    """-inf where a row sees nothing; elsewhere a loss of output and log-sum-exps together."""
    documents, padding = MASKS[name]
    intervals, mask = intervals_of(documents, padding).to(device), dense_mask(documents, padding).to(device)
    sees = mask.any(-1)
    upstream = _random(9, 4, len(mask), dtype=torch.float64, device=device)[:, sees]

    def with_lse(q, k, v, impl=None):
        if impl is None:
            out, lse = attention(q, k, v, mask, None, 0.25), plain_lse(q, k, mask, 0.25)
        else:
            out, lse = mixed_attention(q, k, v, intervals, return_lse=True, impl=impl)
            assert lse.shape == (4, len(mask)) and lse.dtype == torch.float32
        assert (lse[:, ~sees] == -float("inf")).all()
        return torch.cat(
            [out.flatten(), lse[:, sees].flatten(), (lse[:, sees] * upstream.to(lse)).sum()[None]]
        )

    heads = {"q": 4, "k": 2, "v": 2}
    inputs = {n: _random(i, len(mask), h, 16, device=device) for i, (n, h) in enumerate(heads.items())}
    check(Problem(name=f"lse {name}", inputs=inputs, ours=with_lse, plain=with_lse), impl)


@pytest.mark.parametrize("cuts", [(0, 20, 43), (0, 1, 9, 43)], ids=["halves", "uneven"])
def test_parts_of_the_keys_merge_to_the_whole(cuts, impl, device, poison):
    """What ring attention does: every rank's keys on their own, then one sum; gradients too."""
    intervals = intervals_of(DOCUMENTS, 3).to(device)
    mask = dense_mask(DOCUMENTS, 3).to(device)
    spans = list(itertools.pairwise(cuts))

    def merged(q, k, v, impl):
        parts = [
            mixed_attention(
                q, k[slice(*span)], v[slice(*span)], intervals.part((0, 43), span), return_lse=True, impl=impl
            )
            for span in spans
        ]
        out, lse = merge_attention(*zip(*parts, strict=True))
        assert (lse[:, 40:] == -float("inf")).all()
        return torch.cat([out.flatten(), lse[:, :40].flatten()])

    def plain(q, k, v):
        return torch.cat(
            [attention(q, k, v, mask, None, 0.25).flatten(), plain_lse(q, k, mask, 0.25)[:, :40].flatten()]
        )

    inputs = {
        n: _random(i, 43, h, 16, device=device) for i, (n, h) in enumerate({"q": 4, "k": 2, "v": 2}.items())
    }
    check(Problem(name="merged", inputs=inputs, ours=merged, plain=plain), impl)


def test_decoding_token_by_token_is_the_whole(impl, device):
    """Keys rotated when they enter the cache, one query at a time."""
    intervals = intervals_of(((text(5), image(6), text(9)),)).to(device)
    rope = rope_table(torch.arange(20, device=device).expand(3, -1), 16)
    q, k, v = (_random(i, 20, h, 16, device=device) for i, h in enumerate((4, 2, 2)))
    want = mixed_attention(q, k, v, intervals, rope, impl=impl)
    q, k = rotate(q, *rope), rotate(k, *rope)
    for at in range(11, 20):  # after the image
        mask = intervals.part((at, at + 1), (0, at + 1))
        got = mixed_attention(q[at : at + 1], k[: at + 1], v[: at + 1], mask, impl=impl)
        torch.testing.assert_close(got, want[at : at + 1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shared", [True, False], ids=["one mask", "a mask each"])
def test_the_batched_layout(shared, impl, device, poison):
    """[B, T, H, D], from transposed [B, H, T, D] as well, is every sequence by itself."""
    same = ((text(4), image(9), text(7)),)
    documents = [same, same if shared else ((image(11), text(2)), (text(7),)), same]
    masks = [intervals_of(each).to(device) for each in documents]
    mask = masks[0] if shared else Intervals.cat(masks)
    rope = rope_table(torch.arange(20, device=device).expand(3, -1), 16)
    q, k, v = (_random(i, 3, h, 20, 16, device=device).transpose(1, 2) for i, h in enumerate((4, 2, 2)))
    out, lse = mixed_attention(q, k, v, mask, rope, return_lse=True, impl=impl)
    for b, each in enumerate(masks):
        want, want_lse = mixed_attention(q[b], k[b], v[b], each, rope, return_lse=True, impl=impl)
        torch.testing.assert_close(out[b], want, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(lse[b], want_lse, rtol=1e-5, atol=1e-6)


def test_a_batch_on_a_cache(impl, device):
    mask = intervals_of(((text(10),),)).to(device).part((8, 10), (0, 10))
    q, k, v = (_random(i, 2, t, h, 16, device=device) for i, (t, h) in enumerate(((2, 4), (10, 2), (10, 2))))
    got = mixed_attention(q, k, v, mask, impl=impl)
    for b in range(2):
        want = mixed_attention(q[b], k[b], v[b], mask, impl=impl)
        torch.testing.assert_close(got[b], want, rtol=1e-5, atol=1e-6)


def test_no_keys_and_no_queries(impl, device):
    mask = intervals_of(((text(4),),)).to(device)
    q, k = torch.ones(4, 2, 16, device=device, requires_grad=True), torch.ones(0, 2, 16, device=device)
    out, lse = mixed_attention(q, k, k, mask.part((0, 4), (0, 0)), return_lse=True, impl=impl)
    out.sum().backward()
    assert not out.any() and not q.grad.any()
    assert lse.shape == (2, 4) and (lse == -float("inf")).all()
    out, lse = mixed_attention(k, q, q, mask.part((0, 0), (0, 4)), return_lse=True, impl=impl)
    assert out.shape == (0, 2, 16) and lse.shape == (2, 0)


def test_what_parts_and_batches_refuse():
    mask = intervals_of(((text(6),),))
    x = torch.zeros(6, 1, 16)
    with pytest.raises(ValueError, match=r"k_TGD has shape \[6, 1, 16\], want \[4, G, 16\]"):
        mixed_attention(x, x, x, mask.part((0, 6), (0, 4)), impl="reference")
    table = torch.zeros(2, 8)
    with pytest.raises(ValueError, match="rope with 2 queries and 6 keys, want as many of both; rotate"):
        mixed_attention(x[:2], x, x, mask.part((0, 2), (0, 6)), (table, table), impl="reference")
    with pytest.raises(ValueError, match=r"k_BTGD has shape \[6, 1, 16\], want \[2, T, G, 16\]"):
        mixed_attention(torch.zeros(2, 6, 1, 16), x, x, mask, impl="reference")
    with pytest.raises(ValueError, match="intervals of 5 tokens on cpu, want 12"):
        mixed_attention(*[torch.zeros(2, 6, 1, 16)] * 3, intervals_of(((text(5),),)), impl="reference")
    with pytest.raises(ValueError, match="1 outputs and 2 log-sum-exps"):
        merge_attention([x], [x, x])
