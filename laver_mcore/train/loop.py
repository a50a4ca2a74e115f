"""The training loop: data -> step -> metrics -> checkpoint, until the last iteration."""

import contextlib
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch

from laver_mcore.accounting.devices import peak_tflops
from laver_mcore.accounting.throughput import throughput
from laver_mcore.accounting.timers import Timers, time_columns
from laver_mcore.accounting.work import StepWork
from laver_mcore.data.sequence.batch import Batch
from laver_mcore.data.serve.exchange import connect
from laver_mcore.data.serve.loader import DialogueData
from laver_mcore.megatron.checkpoints import CheckpointError
from laver_mcore.train.checkpoint import Progress
from laver_mcore.train.counts import SIMILARITY
from laver_mcore.train.divergence import SpikeGuard, check_replicas
from laver_mcore.train.engine import Engine
from laver_mcore.train.metrics import Metrics
from laver_mcore.train.profiling import Profiler
from laver_mcore.train.saving import Saver
from laver_mcore.train.skips import Skips
from laver_mcore.train.step import StepResult, check_teacher_moved, train_step


@dataclass(frozen=True, kw_only=True)
class RunState:
    """What carries over from step to step besides the engine's tensors; tensors are scalars on the device."""

    progress: Progress
    skipped: int | torch.Tensor = 0
    student_moved: bool | torch.Tensor = False
    """Whether the student has changed since the teacher last moved."""
    teacher_distance: float = 0.0


def _due(iteration: int, interval: int | None) -> bool:
    return interval is not None and iteration % interval == 0


def _after(state: RunState, result: StepResult, engine: Engine) -> RunState:
    """The state after one step; stops the run if the teacher stood still when it should have moved."""
    moved: bool | torch.Tensor = state.student_moved | (
        result.applied & (result.grad_norm > 0.0) & (result.learning_rate > 0.0)
    )
    distance = state.teacher_distance
    # Waits for the device, but only when it is the teacher's turn; in a skipped step it did not move.
    move = result.teacher_move
    if move is not None and bool(result.applied):
        distance = float(move.distance)
        teacher_trains = engine.teacher is not None and engine.teacher.trains
        iteration = state.progress.iteration + 1
        check_teacher_moved(iteration, distance, move.momentum, bool(moved) and teacher_trains)
        moved = False
    progress = replace(
        state.progress,
        iteration=state.progress.iteration + 1,
        consumed_rows=state.progress.consumed_rows + engine.config.train.global_batch_size,
    )
    return replace(
        state,
        progress=progress,
        skipped=state.skipped + (~result.applied).int(),
        student_moved=moved,
        teacher_distance=distance,
    )


def metrics_row(state: RunState, result: StepResult, engine: Engine) -> dict[str, Any]:
    """Losses and settings of one iteration; a quantity that this iteration did not have is null."""
    losses: dict[str, float | None] = dict.fromkeys(("loss", *result.terms)) | result.named_losses()
    counts = dict(zip(result.terms, result.counts.tolist(), strict=True))
    if not counts[SIMILARITY]:
        losses[SIMILARITY] = None
    teacher = {} if engine.teacher is None else {"teacher_distance": state.teacher_distance}
    return {
        "iteration": state.progress.iteration,
        **losses,
        "grad_norm": float(result.grad_norm),
        "learning_rate": float(result.learning_rate),
        **engine.objective.settings(state.progress.iteration - 1),
        **teacher,
        "skipped": int(state.skipped),
    }


class Validation(Protocol):
    """What a run asks of itself now and then, on all ranks together; `due` for the entries of a metrics line."""

    def due(self, iteration: int, *, exiting: bool) -> bool: ...

    def __call__(self, progress: Progress) -> dict[str, float | None]: ...


class _Interval:
    """Work and time of the iterations since the last metrics line."""

    def __init__(self, engine: Engine, *, enabled: bool) -> None:
        self._engine = engine
        self.timers = Timers(engine.topology.device, enabled=enabled)
        self._work: torch.Tensor | None = None
        self._start, self._steps = time.perf_counter(), 0
        run, device = engine.config.run, engine.topology.device
        known = device.type == "cuda" and engine.config.train.bf16
        self._peak = run.peak_tflops or (peak_tflops(torch.cuda.get_device_name(device)) if known else None)

    def add(self, result: StepResult) -> None:
        """Take in one step; the numbers of its work stay on the device."""
        self._work = result.work if self._work is None else self._work + result.work
        self._steps += 1

    def restart(self) -> None:
        """Begin anew, after a metrics line or a checkpoint."""
        self.timers.take()
        self._work, self._steps, self._start = None, 0, time.perf_counter()

    def columns(self, data_wait_ms: float) -> tuple[dict[str, float | None], float]:
        """Entries of the metrics line, and the seconds of one step; waits for the device."""
        assert self._work is not None
        work, taken, engine = StepWork.of(self._work.tolist()), self.timers.take(), self._engine
        seconds = time.perf_counter() - self._start
        each = seconds / self._steps
        found = throughput(
            engine.config, engine.vocab_size, work, seconds, engine.topology.world_size, self._peak
        )
        return {
            "step_seconds": each,
            "tokens_per_second": work.dialogue_rows / seconds,
            "images_per_second": work.images / seconds,
            **found,
            **time_columns(taken, data_wait_ms, each, self._steps),
        }, each


def _data_start(engine: Engine, progress: Progress) -> int:
    batch = engine.config.train.global_batch_size
    if progress.consumed_rows % batch:
        raise CheckpointError(
            f"{progress.consumed_rows} rows were consumed, which is no multiple of global_batch_size={batch}; "
            "resume with a size that divides it"
        )
    return progress.consumed_rows // batch


def train(
    engine: Engine,
    data: DialogueData,
    progress: Progress,
    metrics: Metrics | None,
    told_to_stop: Callable[[], bool] = lambda: False,
    validations: Sequence[Validation] = (),
) -> Progress:
    """Run from `progress` to the end (or `exit_interval`), saving as the recipe asks; returns where it stopped.

    `told_to_stop` is asked once a step on every rank and gives all of them the same answer; the run then ends early.
    """
    config, topology = engine.config, engine.topology
    first = _data_start(engine, progress)
    steps = data.iterate(
        first,
        first + config.train.train_iters - progress.iteration,
        exchange=connect(topology.replica_group),
        global_batch_size=config.train.global_batch_size,
        micro_batch_size=config.train.micro_batch_size,
        dp_rank=topology.dp_rank,
        dp_size=topology.dp_size,
        image_share=(topology.share, topology.num_shares) if topology.on_first_stage else None,
    )
    # A rank that fails must not wait at its exit for data threads that wait for the other ranks.
    with contextlib.closing(steps), Saver(engine, data.fingerprint()) as saver:
        return _train(engine, data, steps, progress, metrics, told_to_stop, validations, saver)


def _train(
    engine: Engine,
    data: DialogueData,
    steps: Iterable[list[Batch]],
    progress: Progress,
    metrics: Metrics | None,
    told_to_stop: Callable[[], bool],
    validations: Sequence[Validation],
    saver: Saver,
) -> Progress:
    config, topology, total = engine.config, engine.topology, engine.config.train.train_iters
    state = RunState(progress=progress, skipped=progress.skipped)
    listed = Path(config.run.save) / "skipped.jsonl" if config.run.save else None
    skips = Skips(config.run.max_skipped, listed, speaks=topology.speaks_for_samples)
    spikes = SpikeGuard() if config.run.check_for_spiky_loss else None
    profiler, interval = Profiler(config.run, topology.rank), _Interval(engine, enabled=metrics is not None)
    for batches in steps:
        profiler.begin(state.progress.iteration + 1)
        result = train_step(engine, batches, state.progress.iteration, interval.timers)
        interval.add(result)
        state = _after(state, result, engine)
        iteration = state.progress.iteration
        skips.add(iteration, result.applied, batches)
        if spikes is not None:
            spikes.look(iteration, None if result.losses is None else result.losses[0])
        if _due(iteration, config.run.check_weight_hash_across_dp_replicas_interval):
            check_replicas(engine, iteration)
        exiting = iteration == total or _due(iteration, config.run.exit_interval) or told_to_stop()
        profiler.end(iteration, exiting=exiting)
        due = [each for each in validations if each.due(iteration, exiting=exiting)]
        columns, seconds = None, 0.0
        if metrics is not None and (exiting or due or _due(iteration, config.run.log_interval)):
            columns, seconds = interval.columns(data.take_wait_ms())
        held_out = dict(entry for each in due for entry in each(state.progress).items())
        if metrics is not None and columns is not None:
            metrics.write(metrics_row(state, result, engine) | columns | held_out, seconds)
            interval.restart()
        if config.run.save and (exiting or _due(iteration, config.run.save_interval)):
            skips.look()
            saver.save(replace(state.progress, skipped=int(state.skipped)), skips.in_a_row, last=exiting)
            interval.restart()
        else:
            saver.look()
        if exiting:
            break
    skips.look()
    return state.progress
