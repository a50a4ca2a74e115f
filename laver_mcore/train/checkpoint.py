"""Distributed checkpoints: save, resume, and start from another run's weights.

    DIR/iter_0000100.saving/                   on its way
    DIR/iter_0000100/                          torch_dist format with checksums; has its name once it is whole
    DIR/latest_checkpointed_iteration.txt      written last

Holds model, teacher, optimizer, centre, RNG, iteration and data position. Tensors are stored by global name and
offset, so a run continues on any layout.
"""

import shutil
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, is_main_replica
from megatron.core.tensor_parallel import get_cuda_rng_tracker

from laver_mcore.config.schema import Config
from laver_mcore.megatron.checkpoints import (
    CheckpointError,
    check_tokenizer,
    checkpoint_folder,
    identity,
    tokenizer_identity,
)
from laver_mcore.megatron.optimizer_state import load_state, sharded_parameters, sharded_state
from laver_mcore.megatron.publishing import Write, check_finite, check_space, writing
from laver_mcore.megatron.unpickling import reading
from laver_mcore.model.teacher import Teacher
from laver_mcore.train.engine import Engine
from laver_mcore.train.saved_weights import metadata, model_state, open_newest, put_weights, teacher_state


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a run has come."""

    iteration: int = 0
    consumed_rows: int = 0
    skipped: int = 0
    """Steps that changed nothing, for their gradients were not finite."""


_PROGRESS = tuple(f.name for f in fields(Progress))


def _without_frozen(config: Config) -> bool:
    return config.model.lora_rank > 0 and not config.run.save_frozen


def _teacher_to_save(teacher: Teacher | None, model: dict[str, Any]) -> dict[str, Any]:
    if teacher is None:
        return {}
    # Only what this rank writes is gathered into its memory.
    written = set()
    for sharded in sharded_parameters(model):
        keeps = teacher.keeps(sharded.data)
        if is_main_replica(sharded.replica_id) if keeps is None else keeps:
            written.add(sharded.data)
    return teacher_state(model, teacher.whole_averages(written), teacher.keeps)[0]


def _optimizer_state(engine: Engine, model: dict[str, Any], *, is_loading: bool) -> dict[str, Any]:
    if getattr(engine.optimizer, "is_stub_optimizer", False):
        return {}  # nothing trains on this pipeline stage
    return {"optimizer": sharded_state(engine.optimizer, model, metadata(), is_loading=is_loading)}


def _objective_state(engine: Engine) -> dict[str, Any]:
    """What the objective keeps on the last stage, the same on all its ranks."""
    topology = engine.topology
    if not topology.on_last_stage:
        return {}
    replica = (0, topology.tp_rank, topology.dp_cp_group.rank())
    return {
        name: ShardedTensor.from_rank_offsets(name, tensor, replica_id=replica)
        for name, tensor in engine.objective.tensors().items()
    }


def _rng_state(engine: Engine) -> ShardedObject:
    topology = engine.topology
    state = {"torch": torch.get_rng_state(), "tracker": get_cuda_rng_tracker().get_states()}
    if topology.device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state()
    return ShardedObject(
        "rng_state",
        state,
        (topology.pp_size, topology.tp_size, topology.dp_cp_group.size()),
        (topology.pp_rank, topology.tp_rank, topology.dp_cp_group.rank()),
        replica_id=0,
    )


def _layout(engine: Engine) -> list[int]:
    topology = engine.topology
    return [topology.tp_size, topology.pp_size, topology.cp_size, topology.dp_size]


def save(engine: Engine, directory: str | Path, progress: Progress, data_fingerprint: str) -> Path:
    """Write one checkpoint of everything a resume needs; returns its folder. All ranks take part.

    `SaveError` on all ranks where it cannot be written; what was saved before is as it was.
    """
    return begin_save(engine, directory, progress, data_fingerprint).finish()


def begin_save(engine: Engine, directory: str | Path, progress: Progress, data_fingerprint: str) -> Write:
    """The same without waiting for the disk: training may go on, and the checkpoint is there once it is finished."""
    folder = checkpoint_folder(directory, progress.iteration)
    aside = folder.with_name(f"{folder.name}.saving")
    with writing(aside):
        if dist.get_rank() == 0:
            shutil.rmtree(aside, ignore_errors=True)  # left by a save that was cut short
            aside.mkdir(parents=True)
    if engine.config.parallel.overlap_param_gather:
        for wrapped in engine.models:
            wrapped.start_param_sync(force_sync=True)
    model = model_state(engine.chunks, _without_frozen(engine.config))
    state = {
        **model,
        "teacher": _teacher_to_save(engine.teacher, model),
        "objective": _objective_state(engine),
        **_optimizer_state(engine, model, is_loading=False),
        "rng": _rng_state(engine),
        "progress": asdict(progress),
        "layout": _layout(engine),
        "distributed_optimizer": engine.config.parallel.use_distributed_optimizer,
        "identity": identity(engine.config, engine.vocab_size),
        "without_frozen": _without_frozen(engine.config),
        "data": data_fingerprint,
        "tokenizer": tokenizer_identity(engine.config, engine.tokenizer_digest),
    }
    check_finite(engine.chunks)
    check_space(state, aside)
    return Write(state, metadata(), aside, folder, engine.topology.dp_cp_group)


def load(engine: Engine, directory: str | Path, data_fingerprint: str) -> Progress:
    """Resume: load everything into `engine` and return where the run stood. Raises `CheckpointError`."""
    folder, common = open_newest(
        directory, identity(engine.config, engine.vocab_size), verify=engine.config.run.verify_checkpoint
    )
    check_tokenizer(folder, common, engine.config.data.tokenizer_model, engine.tokenizer_digest)
    if common["data"] != data_fingerprint:
        raise CheckpointError(
            f"{folder} was trained on other data (records, tokenizer, seed or lengths changed); to start anew from its "
            f"weights use --pretrained-checkpoint {directory}"
        )
    without_frozen = common.get("without_frozen", False)
    model = model_state(engine.chunks, without_frozen)
    distributed = common["distributed_optimizer"]
    if distributed != engine.config.parallel.use_distributed_optimizer:
        flag = "--use-distributed-optimizer" if distributed else "--no-use-distributed-optimizer"
        raise CheckpointError(f"{folder} holds the state of the other kind of optimizer; resume with {flag}")
    teacher: dict[str, Any] = {}
    owners: dict[str, torch.nn.Parameter] = {}
    if engine.teacher is not None:
        wanted = [p for p in engine.teacher.parameters if engine.teacher.keeps(p) is not False]
        averages = {p: torch.empty(p.shape) for p in wanted}
        teacher, owners = teacher_state(model, averages, engine.teacher.keeps)
    state = {
        **model,
        "teacher": teacher,
        "objective": _objective_state(engine),
        **_optimizer_state(engine, model, is_loading=True),
    }
    same_layout = common["layout"] == _layout(engine)
    if same_layout:
        state["rng"] = _rng_state(engine)
    with reading(folder):
        loaded = dist_checkpointing.load(state, str(folder))
    for i, chunk in enumerate(engine.chunks):
        put_weights(chunk, loaded[f"model{i}"], whole=not without_frozen)
    if "optimizer" in loaded:
        load_state(engine.optimizer, loaded["optimizer"])
    if engine.teacher is not None:
        engine.teacher.load({owners[name]: whole for name, whole in loaded["teacher"].items()})
    for name, tensor in engine.objective.tensors().items() if engine.topology.on_last_stage else ():
        tensor.copy_(loaded["objective"][name])
    if same_layout:
        _restore_rng(loaded["rng"])
    return Progress(**{name: value for name, value in common["progress"].items() if name in _PROGRESS})


def _restore_rng(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])
    get_cuda_rng_tracker().set_states(state["tracker"])
