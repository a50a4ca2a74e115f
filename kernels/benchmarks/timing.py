"""Times on a CUDA GPU: medians over rotated inputs larger than L2, forward and backward apart."""

import statistics
from collections.abc import Callable

import torch
from baselines import GEMMS_ALONE
from registry import Benchmark, Workload
from report import Machine, Row
from torch import Tensor

WARM_UP = 5
COPIES_LIMIT = 8


def time_benchmark(benchmark: Benchmark, machine: Machine, repeats: int) -> list[Row]:
    """One row per direction. A baseline that cannot run, or disagrees with ours, is named and left out."""
    workload = benchmark.build()
    copies = _copies(workload, machine.l2_bytes)
    contenders = {"ours": workload.ours} | _agreeing(workload, copies[0], benchmark)
    rows = []
    for direction, work in workload.work.items():
        measured = {}
        for name, function in contenders.items():
            try:
                measured[name] = _median_ms(function, copies, direction, repeats)
            except (RuntimeError, NotImplementedError) as error:
                if name == "ours":
                    raise
                print(f"  {name} cannot run {direction}: {str(error).splitlines()[0]}")
        if direction == "forward":
            for name, function in workload.extra_times.items():
                measured[name] = median_of(lambda _, function=function: function(), copies, repeats)
        ours_ms = measured.pop("ours")
        rate = work / (ours_ms * 1e-3) / (1e12 if workload.unit == "TF/s" else 1e9)
        peak = machine.teraflops if workload.unit == "TF/s" else machine.gigabytes
        rows.append(
            Row(
                operation=benchmark.operation,
                case=benchmark.case,
                direction=direction,
                dtype=benchmark.dtype,
                milliseconds=ours_ms,
                baselines=measured,
                rate=rate,
                unit=workload.unit,
                share_of_floor=None if peak is None else rate / peak,
                peak_bytes=_peak_bytes(workload.ours, copies[0], direction),
            )
        )
    return rows


def _copies(workload: Workload, l2_bytes: int) -> list[dict[str, Tensor]]:
    """Enough sets of inputs that one is gone from L2 before its turn comes again."""
    first = workload.make_inputs(0)
    size = sum(x.nbytes for x in first.values())
    count = max(2, min(COPIES_LIMIT, -(-3 * l2_bytes // size)))
    copies = [first] + [workload.make_inputs(seed) for seed in range(1, count)]
    if workload.work.keys() != {"forward"}:
        for copy in copies:
            for tensor in copy.values():
                tensor.requires_grad_()
    return copies


def _agreeing(
    workload: Workload, inputs: dict[str, Tensor], benchmark: Benchmark
) -> dict[str, Callable[..., Tensor]]:
    """Baselines that run and give our output up to bf16: a time of something else is no comparison."""
    agreeing = {}
    want = workload.ours(**{name: x.clone() for name, x in inputs.items()}).detach().float()
    for name, function in workload.baselines.items():
        try:
            got = function(**{key: x.clone() for key, x in inputs.items()}).detach().float()
        except Exception as error:
            print(
                f"  {benchmark.case}: {name} left out: {type(error).__name__}: {str(error).splitlines()[0]}"
            )
            continue
        if name == GEMMS_ALONE or (got - want).norm() <= 0.05 * want.norm() + 1e-6:
            agreeing[name] = function
        else:
            print(f"  {benchmark.case}: {name} left out: it disagrees with ours")
    return agreeing


def _median_ms(function: Callable[..., Tensor], copies, direction: str, repeats: int) -> float:
    if direction == "forward":
        return median_of(lambda copy: function(**copy), copies, repeats)
    if direction == "both":
        return median_of(lambda copy: with_gradients(function, copy), copies, repeats)
    graphs = []
    for copy in copies:
        output = function(**copy)
        graphs.append((output, list(copy.values()), torch.randn_like(output)))

    def backward(graph):
        output, inputs, upstream = graph
        return torch.autograd.grad(output, inputs, upstream, retain_graph=True)

    return median_of(backward, graphs, repeats)


def with_gradients(function: Callable[..., Tensor], inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
    output = function(**inputs)
    return torch.autograd.grad(output, list(inputs.values()), torch.ones_like(output))


def median_of(call: Callable, arguments: list, repeats: int) -> float:
    """Median milliseconds of one call, by CUDA events."""
    for i in range(WARM_UP):
        call(arguments[i % len(arguments)])
    events = [
        (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)
    ]
    torch.cuda.synchronize()
    for i, (start, end) in enumerate(events):
        start.record()
        call(arguments[i % len(arguments)])
        end.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in events)


def _peak_bytes(function: Callable[..., Tensor], inputs: dict[str, Tensor], direction: str) -> int:
    """Memory over the inputs that one call takes at most, with its backward if that is what is timed."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    if direction == "forward":
        function(**inputs)
    else:
        with_gradients(function, inputs)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before
