"""Times of one benchmark: medians over rotated inputs larger than L2, forward and backward apart."""

import statistics
from collections.abc import Callable
from typing import Any, Protocol

import torch
from baselines import GEMMS_ALONE, LeftOut, Prepared
from report import Machine, Row, gpu_state
from torch import Tensor
from workload import Benchmark, Workload

COPIES_LIMIT = 8
WARM_UP = 3
FEWEST_REPEATS = 5
MOST_MS = 1500.0  # of one measurement: a baseline that takes 300 ms a call is repeated five times, not thirty
SHORT_MS = 1.0
SLEEP_CYCLES = 50_000_000  # about 30 ms


class Clock(Protocol):
    """What measures: CUDA events here, a pretence of them in tests."""

    device: str

    def milliseconds(self, call: Callable[[Any], object], arguments: list, repeats: int) -> list[float]:
        """Times of `call` over its arguments in turn."""
        ...

    def peak_bytes(self, call: Callable[[], object]) -> int:
        """Memory that a call takes at most over what is allocated before it."""
        ...

    def forget(self) -> None:
        """Gives unused memory and compiled code back before the next benchmark."""
        ...


class CudaClock:
    """CUDA events around every call; short calls are queued behind a sleeping kernel.

    Queued, the time of a call of 20 microseconds is the GPU's, and not that of the Python in front of it.
    """

    device = "cuda"

    def milliseconds(self, call: Callable[[Any], object], arguments: list, repeats: int) -> list[float]:
        for i in range(WARM_UP):
            call(arguments[i % len(arguments)])
        once = min(self._record(call, arguments, 2))
        repeats = max(FEWEST_REPEATS, min(repeats, int(MOST_MS / max(once, 1e-3))))
        if once < SHORT_MS:
            torch.cuda._sleep(SLEEP_CYCLES)
        return self._record(call, arguments, repeats)

    def _record(self, call: Callable[[Any], object], arguments: list, repeats: int) -> list[float]:
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
        for i, (start, end) in enumerate(events):
            start.record()
            call(arguments[i % len(arguments)])
            end.record()
        torch.cuda.synchronize()
        return [start.elapsed_time(end) for start, end in events]

    def peak_bytes(self, call: Callable[[], object]) -> int:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def forget(self) -> None:
        # One function serves every shape: after eight of them torch.compile would go on uncompiled.
        torch._dynamo.reset()
        torch.cuda.empty_cache()


def time_benchmark(benchmark: Benchmark, machine: Machine, repeats: int, clock: Clock) -> list[Row]:
    """One row per direction. A baseline that cannot run, or disagrees with ours, is named with the reason."""
    clock.forget()
    workload = benchmark.build(clock.device)
    copies = rotated_copies(workload, machine.l2_bytes)
    contenders, left_out = _agreeing(workload, copies[0])
    wrong_gradients = _wrong_gradients(workload, contenders, copies[0])
    rows = []
    for direction in workload.work:
        missing = left_out | (wrong_gradients if direction != "forward" else {})
        measured: dict[str, tuple[float, int]] = {}
        for name, function in ({"ours": workload.ours} | contenders).items():
            if name in missing:
                continue
            try:
                measured[name] = measure_direction(*_prepared(function, copies), direction, repeats, clock)
            except Exception as error:
                if name == "ours":
                    raise
                missing[name] = reason(error)
        extra = {}
        if direction == "forward":
            for name, function in workload.extra_times.items():
                extra[name] = _time_alone(function, repeats, clock, missing, name)
        rows.append(_row(benchmark, workload, direction, measured, extra, missing, machine))
    return rows


def _time_alone(
    function: Callable[[], object], repeats: int, clock: Clock, missing: dict[str, str], name: str
) -> float | None:
    try:
        return statistics.median(clock.milliseconds(lambda _: function(), [None], repeats))
    except Exception as error:
        missing[name] = reason(error)
        return None


def _row(
    benchmark: Benchmark,
    workload: Workload,
    direction: str,
    measured: dict[str, tuple[float, int]],
    extra: dict[str, float | None],
    missing: dict[str, str],
    machine: Machine,
) -> Row:
    work = workload.work[direction]
    ours_ms, ours_peak = measured.pop("ours")
    is_known = machine.teraflops is not None and machine.gigabytes is not None
    return Row(
        operation=benchmark.operation,
        case=benchmark.case,
        direction=direction,
        dtype=benchmark.dtype,
        milliseconds=ours_ms,
        rate=work.flops / (ours_ms * 1e9) if workload.unit == "TF/s" else work.bytes / (ours_ms * 1e6),
        unit=workload.unit,
        floor_ms=work.floor_ms(machine.teraflops, machine.gigabytes) if is_known else None,
        peak_bytes=ours_peak,
        baselines={name: ms for name, (ms, _) in measured.items()}
        | {name: ms for name, ms in extra.items() if ms is not None},
        baseline_peak_bytes={name: peak for name, (_, peak) in measured.items()},
        left_out=missing,
        state=gpu_state(),
        peaks={"teraflops": machine.teraflops, "gigabytes": machine.gigabytes} if is_known else {},
    )


def measure_peaks(clock: Clock, size: int = 8192, copied: int = 2**30) -> tuple[float, float]:
    """This GPU's bf16 matrix rate (TF/s) and copy bandwidth (GB/s, read and written), by cuBLAS and by copy."""
    a, b = (torch.randn(size, size, device=clock.device).bfloat16() for _ in range(2))
    gemm = statistics.median(clock.milliseconds(lambda _: a @ b, [None], 20))
    source = torch.zeros(copied, dtype=torch.uint8, device=clock.device)
    target = torch.empty_like(source)
    copy = statistics.median(clock.milliseconds(lambda _: target.copy_(source), [None], 20))
    return 2 * size**3 / (gemm * 1e9), 2 * copied / (copy * 1e6)


def rotated_copies(workload: Workload, l2_bytes: int) -> list[dict[str, Tensor]]:
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
    workload: Workload, inputs: dict[str, Tensor]
) -> tuple[dict[str, Callable[..., Tensor]], dict[str, str]]:
    """Baselines that run and give our output up to bf16, and why the others do not count."""
    agreeing, left_out = {}, {}
    want = _output(workload.ours, inputs)
    for name, build in workload.baselines.items():
        try:
            function = build()
            distance = (_output(function, inputs) - want).norm()
        except Exception as error:
            left_out[name] = reason(error)
            continue
        if name == GEMMS_ALONE or distance <= 0.05 * want.norm() + 1e-6:
            agreeing[name] = function
        else:
            left_out[name] = "disagrees with ours"
    return agreeing, left_out


def _wrong_gradients(
    workload: Workload, contenders: dict[str, Callable[..., Tensor]], inputs: dict[str, Tensor]
) -> dict[str, str]:
    """Why a baseline's backward is not timed: it has none, or gives other gradients than ours."""
    if workload.work.keys() == {"forward"}:
        return {}
    want = with_gradients(workload.ours, inputs)
    found = {}
    for name, function in contenders.items():
        try:
            got = with_gradients(function, inputs)
        except Exception as error:
            found[name] = reason(error)
            continue
        far = [
            key
            for key, ours, theirs in zip(inputs, want, got, strict=True)
            if not (theirs.float() - ours.float()).norm() <= 0.05 * ours.float().norm() + 1e-6
        ]
        if far and name != GEMMS_ALONE:
            found[name] = f"another gradient of {', '.join(far)}"
    return found


def _prepared(function: Callable[..., Tensor], copies: list) -> tuple[Callable[..., Tensor], list]:
    """A baseline and the inputs that it is timed with."""
    if not isinstance(function, Prepared):
        return function, copies
    made = [function.prepare(**copy) for copy in copies]
    needs_grad = any(x.requires_grad for x in copies[0].values())
    leaves = [{name: x.detach().requires_grad_(needs_grad) for name, x in each.items()} for each in made]
    return function.function, leaves


def _output(function: Callable[..., Tensor], inputs: dict[str, Tensor]) -> Tensor:
    # Fresh copies: an update in place must not see the last one's result. A leaf would refuse it.
    return function(**{name: x.detach().clone() for name, x in inputs.items()}).float()


def reason(error: Exception) -> str:
    """One line for the table; a reason of ours as it is."""
    if isinstance(error, LeftOut):
        return str(error)
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:120] if lines else ''}"


def measure_direction(
    function: Callable[..., Tensor], copies: list, direction: str, repeats: int, clock: Clock
) -> tuple[float, int]:
    """Median milliseconds and peak bytes; the backward's peak includes its forward."""
    if direction == "forward":
        times = clock.milliseconds(lambda copy: function(**copy), copies, repeats)
        return statistics.median(times), clock.peak_bytes(lambda: function(**copies[0]))
    peak = clock.peak_bytes(lambda: with_gradients(function, copies[0]))
    if direction == "both":
        times = clock.milliseconds(lambda copy: with_gradients(function, copy), copies, repeats)
        return statistics.median(times), peak
    graphs = []
    for copy in copies:
        output = function(**copy)
        graphs.append((output, list(copy.values()), torch.randn_like(output)))

    def backward(graph):
        output, inputs, upstream = graph
        return torch.autograd.grad(output, inputs, upstream, retain_graph=True)

    return statistics.median(clock.milliseconds(backward, graphs, repeats)), peak


def with_gradients(function: Callable[..., Tensor], inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
    """One forward and the gradients of all inputs."""
    output = function(**inputs)
    return torch.autograd.grad(output, list(inputs.values()), torch.ones_like(output))
