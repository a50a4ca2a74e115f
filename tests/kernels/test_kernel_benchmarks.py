"""What the benchmarks rest on: every registered case, and the decomposed baseline's arithmetic."""

import dataclasses

import pytest
import torch


def test_registered_shapes(modules):
    registry = modules.registry
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
    baselines = modules.attention_baselines
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


def test_ranges_of_segments_make_the_mixed_mask(modules):
    """What Magi's kernel is given: full ranges, and causal ones from the lower right."""
    from laver_kernels.testing_masks import dense_mask, image, text

    documents = ((text(4), image(6), text(3), image(1)), (image(5), text(2)))
    mask = torch.zeros(21, 21, dtype=torch.bool)
    for (a, b), (c, d), kind in zip(*modules.attention_baselines.segment_ranges(documents), strict=True):
        block = torch.ones(b - a, d - c, dtype=torch.bool)
        mask[a:b, c:d] |= block.tril(d - c - (b - a)) if kind == 1 else block
    assert torch.equal(mask, dense_mask(documents))


def test_report_writes_what_it_was_given(modules, tmp_path):
    import json

    report = modules.report
    machine = _machine(report)
    row = _row(report, left_out={"liger": "liger_kernel is not installed"})
    paths = report.write([row], machine, tmp_path)
    read = json.loads(paths[0].read_text())
    assert read[0]["gpu"] == "Some GPU"
    assert read[0]["baselines"] == {"eager": 5.0}
    assert "eager 5.000 (2.50x, 3), liger: liger_kernel is not installed" in paths[1].read_text()
    assert report.read(machine, tmp_path) == [row]
    assert report.read(dataclasses.replace(machine, commit="other"), tmp_path) == []


def _machine(report, **change):
    machine = report.Machine(
        gpu="Some GPU", torch="2", triton="3", cuda="13", commit="abc", teraflops=100.0, gigabytes=1000.0,
        l2_bytes=1,
    )  # fmt: skip
    return dataclasses.replace(machine, **change)


def _row(report, **change):
    row = report.Row(
        operation="gram_loss", case="64 x 729", direction="forward", dtype="bf16", milliseconds=2.0,
        baselines={"eager": 5.0}, baseline_peak_bytes={"eager": 3 * 10**6}, rate=300.0, unit="TF/s",
        floor_ms=1.0, peak_bytes=10**6,
    )  # fmt: skip
    return dataclasses.replace(row, **change)


class PretendedClock:
    """Runs every call once and says that it took a millisecond."""

    device = "cpu"

    def __init__(self) -> None:
        self.calls = 0

    def milliseconds(self, call, arguments, repeats):
        for argument in arguments:
            self.calls += 1
            call(argument)
        return [1.0] * len(arguments)

    def peak_bytes(self, call):
        call()
        return 1

    def forget(self):
        pass


SMALL = {
    "mixed_attention": lambda registry: registry.attention_workload(
        registry.SMALL_MIXES["five images"], (4, 2), 16, rotate=True, device="cpu"
    ),
    "gram_loss": lambda registry: registry.gram_workload((9, 5), 16, "cpu"),
    "latent_cross_entropy": lambda registry: registry.latent_workload(9, 4, 16, "cpu"),
    "ema_update_": lambda registry: registry.ema_workload(100, "cpu"),
    "linear_cross_entropy": lambda registry: registry.head_workload(6, 40, 16, "cpu"),
}
HAVE_TO_RUN = {  # on a CPU, uncompiled; FlexAttention takes no inputs with gradients there
    "mixed_attention": {"forward": {"sdpa dense mask", "flex mask"}, "backward": {"sdpa dense mask"}},
    "gram_loss": {way: {"eager bf16", "compiled", "gemms alone"} for way in ("forward", "backward")},
    "latent_cross_entropy": {way: {"eager", "compiled"} for way in ("forward", "backward")},
    "ema_update_": {"forward": {"foreach", "eager", "compiled"}},
    "linear_cross_entropy": {"both": {"eager", "compiled", "gemms alone"}},
}


@pytest.mark.skipif(torch.cuda.is_available(), reason="the clock pretends, on CPU tensors")
@pytest.mark.parametrize("operation", SMALL)
def test_every_workload_runs_through_the_timing(operation, modules, monkeypatch, bf16_interpreter):
    pytest.importorskip("triton")
    monkeypatch.setattr(modules.baselines, "compiled", lambda function: function)
    benchmark = modules.workload.Benchmark(
        operation=operation, case="small", guard=None, build=lambda device: SMALL[operation](modules.registry)
    )
    rows = modules.timing.time_benchmark(benchmark, _machine(modules.report), 3, PretendedClock())
    assert {row.direction: set(row.baselines) - {"fa2 decomposed"} for row in rows} == HAVE_TO_RUN[operation]
    for row in rows:
        assert row.milliseconds == 1.0
        assert 0 < row.floor_ms < 1e-3
        assert row.share_of_floor == row.floor_ms
        assert not {"ours"} & row.left_out.keys()
        assert all(row.left_out.values()), row.left_out


@pytest.mark.skipif(torch.cuda.is_available(), reason="uncompiled, on CPU tensors")
def test_attention_baselines_agree(modules, monkeypatch):
    """FlexAttention over the intervals' block mask, and SDPA over the dense one, at seven heads to one."""
    from laver_kernels.testing_masks import intervals_of

    monkeypatch.setattr(modules.baselines, "compiled", lambda function: function)
    documents = modules.registry.SMALL_MIXES["five images"]
    found, _ = modules.attention_baselines.attention(intervals_of(documents), documents, None)
    torch.manual_seed(0)
    q, k, v = (torch.randn(60, heads, 16) for heads in (7, 1, 1))
    torch.testing.assert_close(found["flex"]()(q, k, v), found["sdpa dense mask"]()(q=q, k=k, v=v))


def test_baselines_that_fail_are_named_with_the_reason(modules):
    workload = modules.workload

    def exhausted(x):
        raise torch.OutOfMemoryError("tried to allocate\nmuch")

    def refuse():
        raise modules.baselines.LeftOut("a mask of 9 GB")

    made = workload.Workload(
        make_inputs=lambda seed: {"x": torch.full((4,), float(seed + 1))},
        ours=lambda x: 2 * x,
        baselines={
            "right": lambda: lambda x: x + x,
            "wrong": lambda: lambda x: 3 * x,
            "exhausted": lambda: exhausted,
            "refused": refuse,
            "absent": modules.baselines.where_installed("no_such_module", lambda: None),
            "forward alone": lambda: lambda x: (2 * x).detach(),
            "another gradient": lambda: lambda x: x + 2 * x - x.detach(),
        },
        unit="GB/s",
        work={"forward": workload.Work(bytes=4e6), "backward": workload.Work(bytes=8e6)},
    )
    benchmark = workload.Benchmark(operation="x", case="y", guard=None, build=lambda device: made)
    forward, backward = modules.timing.time_benchmark(
        benchmark, _machine(modules.report), 3, PretendedClock()
    )
    assert set(forward.baselines) == {"right", "forward alone", "another gradient"}
    assert backward.left_out["another gradient"] == "another gradient of x"
    assert set(backward.baselines) == {"right"}
    assert forward.left_out == {
        "wrong": "disagrees with ours",
        "exhausted": "out of memory",
        "refused": "a mask of 9 GB",
        "absent": "no_such_module is not installed",
    }
    assert backward.left_out["forward alone"].startswith(
        "RuntimeError: element 0 of tensors does not require"
    )
    assert (forward.rate, forward.floor_ms, backward.floor_ms) == (4.0, 0.004, 0.008)


def test_a_run_in_several_calls_adds_to_its_rows(modules, tmp_path, monkeypatch, capsys):
    """Nothing is timed twice with --resume, and rows of another commit are not kept."""
    timed = []

    def pretend(benchmark, machine, repeats, clock):
        timed.append(benchmark.case)
        return [_row(modules.report, operation=benchmark.operation, case=benchmark.case)]

    monkeypatch.setattr(modules.timing, "time_benchmark", pretend)
    arguments = modules.run.parse(
        ["--operations", "gram_loss", "--quick", "--resume", "--output", str(tmp_path)]
    )
    machine = _machine(modules.report)
    assert [benchmark.case for benchmark in arguments.chosen] == ["64 x 729, K=3584", "64 x 1024, K=3584"]
    assert modules.run.time_all(arguments.chosen[:1], machine, PretendedClock(), arguments) == 0
    assert modules.run.time_all(arguments.chosen, machine, PretendedClock(), arguments) == 0
    assert timed == ["64 x 729, K=3584", "64 x 1024, K=3584"]
    assert len(modules.report.read(machine, tmp_path)) == 2
    arguments.minutes = -1.0
    modules.run.time_all(arguments.chosen, _machine(modules.report, commit="new"), None, arguments)
    assert "2 cases left" in capsys.readouterr().out


def test_a_case_that_fails_costs_the_others_nothing(modules, tmp_path, monkeypatch, capsys):
    def pretend(benchmark, machine, repeats, clock):
        if "729" in benchmark.case:
            raise torch.OutOfMemoryError("much")
        return [_row(modules.report, operation=benchmark.operation, case=benchmark.case)]

    monkeypatch.setattr(modules.timing, "time_benchmark", pretend)
    arguments = modules.run.parse(["--operations", "gram_loss", "--quick", "--output", str(tmp_path)])
    machine = _machine(modules.report)
    assert modules.run.time_all(arguments.chosen, machine, PretendedClock(), arguments) == 1
    assert [row.case for row in modules.report.read(machine, tmp_path)] == ["64 x 1024, K=3584"]
    assert "FAIL  gram_loss 64 x 729, K=3584: out of memory" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="the clock pretends, on CPU tensors")
@pytest.mark.parametrize(("names", "left"), [(["none"], set()), (["eager"], {"eager"})])
def test_only_the_named_baselines_are_timed(names, left, modules, tmp_path, bf16_interpreter):
    pytest.importorskip("triton")
    small = modules.workload.Benchmark(
        operation="latent_cross_entropy", case="small", guard=None,
        build=lambda device: modules.registry.latent_workload(9, 4, 16, "cpu"),
    )  # fmt: skip
    arguments = modules.run.parse(["--baselines", *names, "--output", str(tmp_path)])
    machine = _machine(modules.report)
    assert modules.run.time_all([small], machine, PretendedClock(), arguments) == 0
    assert {frozenset(row.baselines) for row in modules.report.read(machine, tmp_path)} == {frozenset(left)}


def test_a_red_check_stops_before_any_timing(modules, monkeypatch, capsys):
    monkeypatch.setattr(modules.run, "check_all", lambda benchmarks, device: 2)
    monkeypatch.setattr(modules.run, "time_all", lambda *arguments: pytest.fail("timed on red"))
    assert modules.run.main(["--quick"]) == 1
    assert "nothing is timed" in capsys.readouterr().out


def test_the_recipes_shapes_are_registered(modules):
    cases = {case.case for case in modules.registry.all_benchmarks() if case.operation == "mixed_attention"}
    for mix in ("one image", "five images", "causal", "reconstruction"):
        for tokens in (4096, 8192, 16384, 32768):
            assert {f"{mix}, T={tokens}, TP={parallel}" for parallel in (1, 2, 4)} <= cases


def test_peaks_and_the_state_of_the_gpu(modules):
    teraflops, gigabytes = modules.timing.measure_peaks(PretendedClock(), size=16, copied=1024)
    assert teraflops == pytest.approx(2 * 16**3 / 1e9) and gigabytes == pytest.approx(2 * 1024 / 1e6)
    state = modules.report.parsed_state("1410, 1593, 388.21, 400.00, [N/A]\n")
    assert state == {
        "sm_megahertz": 1410.0, "memory_megahertz": 1593.0, "watts": 388.21, "power_limit_watts": 400.0
    }  # fmt: skip
