"""A training run from beginning to end: join, validate, build, resume, train, leave."""

import contextlib
import importlib.util
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import yaml

from laver_kernels.backend import decide
from laver_mcore.accounting.typical import typical_mix
from laver_mcore.cli.held_out import build_held_out
from laver_mcore.config.checks import check_world
from laver_mcore.config.errors import ConfigError
from laver_mcore.config.load import to_yaml
from laver_mcore.config.objectives import section_of
from laver_mcore.config.presets import model_name
from laver_mcore.config.renamed import with_todays_keys
from laver_mcore.config.schema import Config, TrainConfig
from laver_mcore.data.serve.loader import DialogueData
from laver_mcore.megatron import parallel
from laver_mcore.megatron.intact import candidates
from laver_mcore.model.parameters import format_trainable
from laver_mcore.train import checkpoint
from laver_mcore.train.build import BuildReport, build_data, build_engine, build_tokenizer, resolve_vocab_size
from laver_mcore.train.checkpoint import Progress
from laver_mcore.train.engine import Engine
from laver_mcore.train.exit_signal import ExitSignal
from laver_mcore.train.loop import Validation, train
from laver_mcore.train.metrics import Metrics
from laver_mcore.train.run_lock import RunLock
from laver_mcore.train.watchdog import Watchdog, own_store

_MAY_CHANGE = {
    "run": None,
    "parallel": None,
    "validation": None,
    "data": {"num_workers", "worker_timeout", "decode_threads", "max_bad_fraction", "index_folder"},
    "train": {"train_iters", "micro_batch_size", "global_batch_size", "kernels", "transformer_impl"},
}
"""What a resumed run may change: any key of a section (None), or the named ones."""


def first_difference(old: dict[str, Any], new: dict[str, Any]) -> str | None:
    """The first key in which two recipes differ beyond what a resume may change, as `section.key was A, now B`.

    A key that `old` does not have is newer than its run, which went as by default.
    """
    name = new["objective"]
    if old.get("objective", name) != name:
        return f"objective was {old['objective']!r}, now {name!r}"
    settings = section_of(name)
    defaults = yaml.safe_load(to_yaml(Config(objective=settings())))
    may_change = _MAY_CHANGE | {name: settings.may_change}
    for section, values in new.items():
        allowed = may_change.get(section, set())
        if section == "objective" or allowed is None:
            continue
        for key, value in values.items():
            before = old.get(section, {}).get(key, defaults[section][key])
            if key not in allowed and before != value:
                return f"{section}.{key} was {before!r}, now {value!r}"
    return None


def check_save_folder(config: Config) -> None:
    """Refuse to write over a run that is not the one being resumed."""
    if not config.run.save:
        return
    directory = Path(config.run.save)
    if directory.exists() and not directory.is_dir():
        raise ConfigError(f"save={directory} is a file; choose a folder")
    # A run that ended before its first save has nothing to lose; its metrics are kept.
    if not candidates(directory):
        return
    difference = _difference(directory, config)
    if difference is not None:
        raise ConfigError(
            f"{directory} holds a run of another recipe ({difference}); choose another --save folder"
        )
    if config.run.load is None or Path(config.run.load).resolve() != directory.resolve():
        raise ConfigError(
            f"{directory} already holds a run; resume it with --load {directory}, or choose another --save"
        )


def _difference(directory: Path, config: Config) -> str | None:
    """How the recipe of the run in a folder differs beyond what a resume may change, if there is one."""
    recipe = directory / "config.yaml"
    if not recipe.is_file():
        return None
    old = with_todays_keys(yaml.safe_load(recipe.read_text(encoding="utf-8")), recipe)
    return first_difference(old, yaml.safe_load(to_yaml(config)))


def check_load_folder(config: Config) -> None:
    """Refuse to resume a run with another recipe, wherever it goes on."""
    if config.run.load is None or not candidates(config.run.load):
        return
    difference = _difference(Path(config.run.load), config)
    if difference is not None:
        raise ConfigError(
            f"load={config.run.load} is a run of another recipe ({difference}); to start anew from its weights use "
            "--pretrained-checkpoint"
        )


def check_machine(config: Config, device: torch.device) -> None:
    """Refuse what is not installed here, or cannot run on `device`, before it is needed halfway."""
    if config.run.wandb_project and importlib.util.find_spec("wandb") is None:
        raise ConfigError("wandb_project needs Weights & Biases; `pip install wandb`, or leave it out")
    try:
        decide(config.train.kernels, device)
    except ValueError as error:
        raise ConfigError(str(error)) from None


def _resume(engine: Engine, config: Config, fingerprint: str) -> Progress:
    directory = config.run.load
    if directory is None:
        return Progress()
    if not candidates(directory):
        if directory != config.run.save and not Path(directory).is_dir():
            raise ConfigError(f"load={directory} does not exist")
        _say(f"no checkpoint in {directory} yet: starting from iteration 0", engine.topology.is_last_rank)
        return Progress()
    progress = checkpoint.load(engine, directory, fingerprint)
    _say(f"resumed from {directory} at iteration {progress.iteration}", engine.topology.is_last_rank)
    return progress


def skip_ahead(progress: Progress, config: Config) -> Progress:
    """`progress` with the data moved on to step `skip_to`; ConfigError for a step that was trained on already."""
    skip_to, batch = config.run.skip_to, config.train.global_batch_size
    if skip_to is None:
        return progress
    if skip_to * batch < progress.consumed_rows:
        raise ConfigError(
            f"skip_to={skip_to} lies behind step {progress.consumed_rows // batch}, where the run stands; "
            "leave it out to go on there"
        )
    return replace(progress, consumed_rows=skip_to * batch)


def _say(message: str, speaks: bool) -> None:
    if speaks:
        print(message, flush=True)


def run(config: Config) -> int:
    """Train as `config` says; returns the exit status 0. Bad input raises before anything is written.

    The process groups of several ranks are left as they are: end the process with `console.run_and_leave`.
    """
    device = parallel.init_distributed()
    try:
        train_run(config, device)
        dist.barrier()  # nobody leaves while others need it
    finally:
        if dist.get_world_size() == 1:
            parallel.shut_down()
    return 0


def train_run(
    config: Config, device: torch.device, watch: Callable[[Engine], Validation] | None = None
) -> Engine:
    """The run inside process groups that are joined already; returns the trained engine.

    What `watch` makes of the engine is asked for metrics beside the recipe's own validations.
    """
    check_world(config, dist.get_world_size())
    check_machine(config, device)
    check_save_folder(config)
    check_load_folder(config)
    tokenizer = build_tokenizer(config)
    data = build_data(config, tokenizer, device)
    held_out = build_held_out(config, tokenizer, device)
    topology = parallel.build_topology(config.parallel, device)
    engine, report = build_engine(config, topology, resolve_vocab_size(config, tokenizer), tokenizer)
    validations = [] if held_out is None else held_out.validations(engine, data.fingerprint())
    validations += [] if watch is None else [watch(engine)]
    progress = _resume(engine, config, data.fingerprint())
    progress = skip_ahead(progress, config)
    if progress.iteration > config.train.train_iters:
        raise ConfigError(
            f"load={config.run.load} stands at iteration {progress.iteration}, past train_iters="
            f"{config.train.train_iters}; raise train_iters"
        )
    dist.barrier()  # nobody writes before everybody has looked
    with _locked(config, topology.rank):
        _announce(engine, str(decide(config.train.kernels, device)), data, report)
        _train(engine, data, progress, validations)
    return engine


def _watched(seconds: float, rank: int, world_size: int) -> contextlib.AbstractContextManager[object]:
    if not seconds or world_size == 1:
        return contextlib.nullcontext()
    return Watchdog(own_store(), rank, world_size, seconds)


@contextlib.contextmanager
def _locked(config: Config, rank: int) -> Iterator[None]:
    """Own the folder that the run writes, on rank 0; all ranks raise what it finds."""
    lock = RunLock(config.run.save) if config.run.save and rank == 0 else contextlib.nullcontext()
    with contextlib.ExitStack() as stack:
        found: list[str | None] = [None]
        try:
            stack.enter_context(lock)
        except ConfigError as error:
            found = [str(error)]
        dist.broadcast_object_list(found)
        if found[0] is not None:
            raise ConfigError(found[0])
        yield


def _train(engine: Engine, data: DialogueData, progress: Progress, validations: Sequence[Validation]) -> None:
    config, topology = engine.config, engine.topology
    if config.run.save and topology.rank == 0:
        Path(config.run.save).mkdir(parents=True, exist_ok=True)
        (Path(config.run.save) / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    metrics, start = Metrics(config, progress.iteration) if topology.is_last_rank else None, time.monotonic()
    try:
        with ExitSignal() if config.run.exit_signal_handler else contextlib.nullcontext() as exit_signal:
            told = exit_signal.received if exit_signal is not None else lambda: False
            with _watched(config.run.silent_rank_timeout, topology.rank, topology.world_size):
                stopped = train(engine, data, progress, metrics, told, validations)
        if exit_signal is not None and exit_signal.seen:
            _say(f"told to stop after iteration {stopped.iteration}: {_kept(config)}", topology.is_last_rank)
        else:
            took = timedelta(seconds=round(time.monotonic() - start))
            done = f"{stopped.iteration:,} of {config.train.train_iters:,} iterations"
            _say(f"finished {done} in {took}: {_kept(config)}", topology.is_last_rank)
        if metrics is not None:
            _say("\n".join(metrics.summary()), topology.is_last_rank)
    finally:
        if metrics is not None:
            metrics.close()


def _kept(config: Config) -> str:
    return f"saved in {config.run.save}" if config.run.save else "nothing saved, for there is no --save"


def _saving(config: Config) -> str:
    """What becomes of the run, said before it begins."""
    run = config.run
    if not run.save:
        return "nothing of this run is kept: there is no --save"
    if not run.save_interval:
        return f"writes {run.save}, a checkpoint at the end alone: there is no --save-interval"
    return f"writes {run.save}, a checkpoint every {run.save_interval:,} iterations"


def passes(train: TrainConfig, data: DialogueData) -> str:
    """A step in dialogues, and the run in epochs: batch sizes count rows, which hold several."""
    rows = data.rows_per_epoch(0)
    dialogues = train.global_batch_size * data.samples_per_epoch(0) / rows
    epochs = train.train_iters * train.global_batch_size / rows
    return f"about {dialogues:,.0f} dialogues a step, {epochs:.2f} epochs in all"


def _announce(engine: Engine, kernels: str, data: DialogueData, report: BuildReport) -> None:
    topology, config = engine.topology, engine.config
    lines = [
        f"{model_name(config.model)}: {len(data.samples):,} dialogues, {config.train.train_iters:,} iterations of "
        f"{config.train.global_batch_size} rows x {config.data.seq_length} tokens",
        passes(config.train, data),
        f"TP {topology.tp_size} x PP {topology.pp_size} x CP {topology.cp_size} x DP {topology.dp_size} on "
        f"{topology.device.type}, kernels: {kernels}, objective {config.objective.name}",
        format_trainable(report.trainable),
        *config.objective.remarks(config, typical_mix(config).image_tokens),
        _saving(config),
    ]
    if report.fresh:
        lines.append(
            f"not in {config.run.pretrained_checkpoint}, freshly initialised: {', '.join(report.fresh)}"
        )
    _say("\n".join(lines), topology.is_last_rank)
