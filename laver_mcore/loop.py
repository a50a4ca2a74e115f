"""The training loop: data -> step -> metrics -> checkpoint, until the last iteration."""

import time
from dataclasses import dataclass, replace
from typing import Any

from laver_mcore import checkpoint, schedules
from laver_mcore.checkpoint import Progress
from laver_mcore.counts import COUNTS
from laver_mcore.data.agreement import agreement
from laver_mcore.data.loader import DialogueData
from laver_mcore.engine import Engine
from laver_mcore.metrics import Metrics
from laver_mcore.schedules import Knobs
from laver_mcore.step import LOSSES, StepResult, check_teacher_moved, train_step


@dataclass(frozen=True, kw_only=True)
class RunState:
    """What carries over from step to step besides the engine's tensors."""

    progress: Progress
    skipped: int = 0
    student_moved: bool = False
    """Whether the student has changed since the teacher last moved."""
    teacher_distance: float = 0.0


def _due(iteration: int, interval: int | None) -> bool:
    return interval is not None and iteration % interval == 0


def _after(state: RunState, result: StepResult, knobs: Knobs, engine: Engine) -> RunState:
    """The state after one step; stops the run if the teacher stood still when it should have moved."""
    moved = state.student_moved or (result.applied and result.grad_norm > 0.0 and knobs.learning_rate > 0.0)
    distance = state.teacher_distance
    if result.teacher_distance is not None:
        distance = float(result.teacher_distance)  # waits for the device, only when the teacher moves
        teacher_trains = engine.teacher is not None and engine.teacher.trains
        check_teacher_moved(distance, knobs, moved and teacher_trains)
        moved = False
    progress = Progress(
        iteration=state.progress.iteration + 1,
        consumed_rows=state.progress.consumed_rows + engine.config.train.global_batch_size,
    )
    return replace(
        state,
        progress=progress,
        skipped=state.skipped + (not result.applied),
        student_moved=moved,
        teacher_distance=distance,
    )


def metrics_row(
    state: RunState, result: StepResult, knobs: Knobs, engine: Engine, seconds: float
) -> dict[str, Any]:
    """The metrics line of one iteration; quantities that do not exist in this run are null."""
    laver = engine.config.laver
    counts = dict(zip(COUNTS, result.counts.tolist(), strict=True))
    losses: dict[str, float | None] = dict.fromkeys(LOSSES)
    if result.losses is not None:
        losses = dict(zip(LOSSES, result.losses.tolist(), strict=True))
    total = None
    if losses["lm_loss"] is not None:
        assert losses["mim_loss"] is not None
        assert losses["gram_loss"] is not None
        total = losses["lm_loss"]
        if laver.laver:
            total += laver.lambda_laver * losses["mim_loss"] + laver.lambda_gram * losses["gram_loss"]
    on = laver.laver
    return {
        "iteration": state.progress.iteration,
        "loss": total,
        "lm_loss": losses["lm_loss"],
        "mim_loss": losses["mim_loss"] if on else None,
        "gram_loss": losses["gram_loss"] if on and laver.gram != "off" else None,
        "grad_norm": result.grad_norm,
        "learning_rate": knobs.learning_rate,
        "mask_ratio": knobs.mask_ratio if on else None,
        "momentum": knobs.momentum if on else None,
        "teacher_distance": state.teacher_distance if on else None,
        "visual_similarity": losses["visual_similarity"] if counts["similar_images"] else None,
        "tokens_per_second": counts["dialogue_rows"] / seconds,
        "images_per_second": counts["images"] / seconds,
        "skipped": state.skipped,
    }


def _data_start(engine: Engine, progress: Progress) -> int:
    batch = engine.config.train.global_batch_size
    if progress.consumed_rows % batch:
        raise checkpoint.CheckpointError(
            f"{progress.consumed_rows} rows were consumed, which is no multiple of global_batch_size={batch}; "
            "resume with a size that divides it"
        )
    return progress.consumed_rows // batch


def train(engine: Engine, data: DialogueData, progress: Progress, metrics: Metrics | None) -> Progress:
    """Run from `progress` to the end (or `exit_interval`), saving as the recipe asks; returns where it stopped."""
    config, topology = engine.config, engine.topology
    total = config.train.train_iters
    state = RunState(progress=progress)
    first = _data_start(engine, progress)
    steps = data.iterate(
        first,
        first + total - progress.iteration,
        agree=agreement(topology.mp_group, topology.device),
        global_batch_size=config.train.global_batch_size,
        micro_batch_size=config.train.micro_batch_size,
        dp_rank=topology.dp_rank,
        dp_size=topology.dp_size,
        image_share=(topology.tp_rank, topology.tp_size) if topology.on_first_stage else None,
    )
    fingerprint = data.fingerprint()
    saved = progress.iteration
    logged_at = time.perf_counter()
    for batches in steps:
        knobs = schedules.at(config, state.progress.iteration)
        result = train_step(engine, batches, knobs)
        state = _after(state, result, knobs, engine)
        iteration = state.progress.iteration
        if metrics is not None and _due(iteration, config.run.log_interval):
            now = time.perf_counter()
            seconds = (now - logged_at) / config.run.log_interval
            row = metrics_row(state, result, knobs, engine, seconds)
            metrics.write(row | {"data_wait_ms": data.take_wait_ms()}, seconds)
            logged_at = now
        exiting = iteration == total or _due(iteration, config.run.exit_interval)
        if config.run.save and (exiting or _due(iteration, config.run.save_interval)):
            checkpoint.save(engine, config.run.save, state.progress, fingerprint)
            saved = iteration
            logged_at = time.perf_counter()
        if exiting:
            break
    steps.close()
    assert config.run.save is None or saved == state.progress.iteration
    return state.progress
