"""What the benchmarks rest on: every registered case, and the decomposed baseline's arithmetic."""

import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = str(Path(__file__).resolve().parents[2] / "kernels" / "benchmarks")


@pytest.fixture
def modules(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    names = ("registry", "baselines", "report")
    before = {name: sys.modules.pop(name, None) for name in names}
    import baselines
    import registry
    import report

    yield registry, baselines, report
    for name, module in before.items():
        sys.modules.pop(name, None)
        if module is not None:
            sys.modules[name] = module


def test_registered_shapes(modules):
    registry, _, _ = modules
    cases = registry.all_benchmarks()
    assert len({(case.operation, case.case) for case in cases}) == len(cases)
    assert {case.operation for case in cases} == {
        "mixed_attention",
        "gram_loss",
        "latent_cross_entropy",
        "ema_update_",
        "linear_cross_entropy",
    }
    for documents_of in registry.MIXES.values():
        for num_tokens in (4096, 8192, 32768):
            total = sum(length for document in documents_of(num_tokens) for _, length in document)
            assert num_tokens - 729 < total <= num_tokens


def test_causal_and_later_image_keys_make_the_mixed_mask(modules):
    """flash-attn's two calls, with dense attention in its place, give the mixed mask's output."""
    _, baselines, _ = modules
    from laver_kernels.testing_masks import dense_mask, image, text

    documents = ((text(4), image(6), text(3), image(1)), (image(5), text(2)))
    torch.manual_seed(0)
    q, k, v = (torch.randn(21, 2, 8, dtype=torch.float64) for _ in range(3))

    def attend(q, k, v, mask):
        score = torch.einsum("ihd,jhd->hij", q, k).masked_fill(~mask, float("-inf"))
        return torch.einsum("hij,jhd->ihd", score.softmax(-1), v), score.logsumexp(-1)

    mask = dense_mask(documents)
    want, _ = attend(q, k, v, mask)
    causal, causal_lse = attend(q, k, v, mask.tril())
    query_at, key_at, bounds = baselines.later_image_keys(documents)
    block = torch.searchsorted(torch.tensor(bounds), torch.arange(len(query_at)), right=True)
    later_mask = (block[:, None] == block) & torch.ones(len(block), len(block)).tril().bool()
    later, later_lse = attend(q[query_at], k[key_at], v[key_at], later_mask)
    merged = baselines.merge(causal[query_at], causal_lse[:, query_at], later, later_lse)
    torch.testing.assert_close(causal.index_copy(0, query_at, merged), want)


def test_report_writes_what_it_was_given(modules, tmp_path):
    import json

    _, _, report = modules
    machine = report.Machine(
        gpu="Some GPU",
        torch="2",
        triton="3",
        cuda="13",
        commit="abc",
        teraflops=None,
        gigabytes=None,
        l2_bytes=1,
    )
    row = report.Row(
        operation="gram_loss", case="64 x 729", direction="forward", dtype="bf16", milliseconds=2.0,
        baselines={"eager": 5.0}, rate=300.0, unit="TF/s", share_of_floor=None, peak_bytes=10**6,
    )  # fmt: skip
    paths = report.write([row], machine, tmp_path)
    read = json.loads(paths[0].read_text())
    assert read[0]["gpu"] == "Some GPU"
    assert read[0]["baselines"] == {"eager": 5.0}
    assert "eager 5.000 (2.50x)" in paths[1].read_text()
