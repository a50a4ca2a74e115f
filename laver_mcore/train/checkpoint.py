"""Distributed checkpoints: save, resume, and start from another run's weights.

    DIR/latest_checkpointed_iteration.txt      written last, so a save that was cut short is never picked up
    DIR/iter_0000100/                          torch_dist format, reshards over TP, PP and DP

Holds model, teacher, optimizer, centre, RNG, iteration and data position. Tensors are stored by global name and
offset, so a run continues on any layout.
"""

import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, is_main_replica
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories
from megatron.core.tensor_parallel import get_cuda_rng_tracker

from laver_mcore.config.schema import Config
from laver_mcore.config.trainable import ADAPTERS
from laver_mcore.data.sequence.tokenizer import VISION_TOKENS
from laver_mcore.megatron.checkpoints import (
    TRACKER,
    CheckpointError,
    checkpoint_folder,
    identity,
    latest_iteration,
    may_start,
)
from laver_mcore.megatron.optimizer import allocate_state, coalesced_offsets, load_state
from laver_mcore.model.initialize import fill_new_rows
from laver_mcore.model.vision_language import VisionLanguageModel
from laver_mcore.train.engine import Engine


def _metadata() -> dict[str, Any]:
    """How Megatron lays out what it saves; a new one each time, for Megatron writes its process groups into it."""
    return {
        # Megatron 0.16's default for the distributed optimizer cannot be saved from CPU, and this one reshards fully.
        "distrib_optim_sharding_type": "fully_reshardable",
        "distrib_optim_fully_reshardable_mem_efficient": False,
        "chained_optim_avoid_prefix": True,
    }


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a run has come."""

    iteration: int = 0
    consumed_rows: int = 0


def _nested(tree: Any) -> Iterator[Any]:
    if isinstance(tree, dict):
        for value in tree.values():
            yield from _nested(value)
    elif isinstance(tree, list | tuple):
        for value in tree:
            yield from _nested(value)
    else:
        yield tree


def _model_state(chunks: list[VisionLanguageModel], without_frozen: bool = False) -> dict[str, Any]:
    """Every chunk's weights; `without_frozen` leaves out the decoder's own, beside which LoRA's adapters stand."""
    states = {f"model{i}": chunk.sharded_state_dict(metadata=_metadata()) for i, chunk in enumerate(chunks)}
    if not without_frozen:
        return states
    return {
        chunk: {
            name: item
            for name, item in state.items()
            if not name.startswith("language_model.") or name.endswith(ADAPTERS)
        }
        for chunk, state in states.items()
    }


def _without_frozen(config: Config) -> bool:
    return config.model.lora_rank > 0 and not config.run.save_frozen


def _teacher_state(
    model: dict[str, Any], averages: dict[torch.nn.Parameter, torch.Tensor]
) -> tuple[dict[str, Any], dict[str, torch.nn.Parameter]]:
    """Whole averages under the model's own sharding, each key prefixed with `teacher.`; and whose each entry is."""
    state: dict[str, Any] = {}
    owners: dict[str, torch.nn.Parameter] = {}
    for sharded in _sharded_parameters(model):
        average = averages.get(sharded.data)
        if average is None:
            continue
        changed: dict[str, Any] = {"key": f"teacher.{sharded.key}", "data": average}
        if isinstance(sharded, ShardedTensor):
            changed["dtype"] = average.dtype
        # Layers share a key and differ by offset, so the entry is named by its place in the dictionary.
        name = str(len(state))
        state[name], owners[name] = replace(sharded, **changed), sharded.data
    return state, owners


def _sharded_parameters(model: dict[str, Any]) -> Iterator[Any]:
    tensors, _ = extract_sharded_tensors_and_factories(model)
    yield from _nested(tensors)


def _teacher_to_save(engine: Engine, model: dict[str, Any]) -> dict[str, Any]:
    if engine.teacher is None:
        return {}
    # Only what this rank writes is gathered into its memory.
    written = {s.data for s in _sharded_parameters(model) if is_main_replica(s.replica_id)}
    return _teacher_state(model, engine.teacher.whole_averages(written))[0]


def _optimizer_state(engine: Engine, model: dict[str, Any], *, is_loading: bool) -> dict[str, Any]:
    if getattr(engine.optimizer, "is_stub_optimizer", False):
        return {}  # nothing trains on this pipeline stage
    if is_loading:
        allocate_state(engine.optimizer)
    with coalesced_offsets(engine.optimizer):
        state = engine.optimizer.sharded_state_dict(model, is_loading=is_loading, metadata=_metadata())
    return {"optimizer": state}


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
    """Write one checkpoint of everything a resume needs; returns its folder. All ranks take part."""
    folder = checkpoint_folder(directory, progress.iteration)
    if dist.get_rank() == 0:
        shutil.rmtree(folder, ignore_errors=True)  # left by a save that was cut short
        folder.mkdir(parents=True)
    dist.barrier()
    if engine.config.parallel.overlap_param_gather:
        for wrapped in engine.models:
            wrapped.start_param_sync(force_sync=True)
    model = _model_state(engine.chunks, _without_frozen(engine.config))
    state = {
        **model,
        "teacher": _teacher_to_save(engine, model),
        "objective": _objective_state(engine),
        **_optimizer_state(engine, model, is_loading=False),
        "rng": _rng_state(engine),
        "progress": asdict(progress),
        "layout": _layout(engine),
        "distributed_optimizer": engine.config.parallel.use_distributed_optimizer,
        "identity": identity(engine.config, engine.vocab_size),
        "without_frozen": _without_frozen(engine.config),
        "data": data_fingerprint,
    }
    dist_checkpointing.save(state, str(folder), content_metadata=_metadata())
    dist.barrier()
    if dist.get_rank() == 0:
        tracker = Path(directory) / TRACKER
        partial = tracker.with_suffix(".tmp")
        partial.write_text(str(progress.iteration), encoding="utf-8")
        partial.replace(tracker)
    dist.barrier()
    return folder


def _open(
    directory: str | Path, wanted_identity: dict[str, Any], *, starts: bool = False
) -> tuple[Path, dict[str, Any]]:
    """Folder and common state of the newest checkpoint, after checking that it is of this model."""
    iteration = latest_iteration(directory)
    if iteration is None:
        raise CheckpointError(f"{directory} holds no checkpoint ({TRACKER} is missing)")
    folder = checkpoint_folder(directory, iteration)
    if not (folder / "metadata.json").is_file():
        raise CheckpointError(f"{folder} is not a complete checkpoint: metadata.json is missing")
    common = dist_checkpointing.load_common_state_dict(str(folder))
    stored = {"family": "qwen2", "lora_rank": 0, "normalize_visual_tokens": False} | common.get(
        "identity", {}
    )
    for name, wanted in wanted_identity.items():
        if starts and may_start(name, stored, wanted, len(VISION_TOKENS)):
            continue
        if stored.get(name) != wanted:
            raise CheckpointError(
                f"{folder} is of another model: it has {name}={stored.get(name)!r}, this recipe {name}={wanted!r}"
            )
    return folder, common


def load(engine: Engine, directory: str | Path, data_fingerprint: str) -> Progress:
    """Resume: load everything into `engine` and return where the run stood. Raises `CheckpointError`."""
    folder, common = _open(directory, identity(engine.config, engine.vocab_size))
    if common["data"] != data_fingerprint:
        raise CheckpointError(
            f"{folder} was trained on other data (records, tokenizer, seed or lengths changed); to start anew from its "
            f"weights use --pretrained-checkpoint {directory}"
        )
    without_frozen = common.get("without_frozen", False)
    model = _model_state(engine.chunks, without_frozen)
    distributed = common["distributed_optimizer"]
    if distributed != engine.config.parallel.use_distributed_optimizer:
        flag = "--use-distributed-optimizer" if distributed else "--no-use-distributed-optimizer"
        raise CheckpointError(f"{folder} holds the state of the other kind of optimizer; resume with {flag}")
    averages = engine.teacher.parameters if engine.teacher is not None else []
    teacher, owners = _teacher_state(model, {p: torch.empty(p.shape) for p in averages})
    state = {
        **model,
        "teacher": teacher,
        "objective": _objective_state(engine),
        **_optimizer_state(engine, model, is_loading=True),
    }
    same_layout = common["layout"] == _layout(engine)
    if same_layout:
        state["rng"] = _rng_state(engine)
    loaded = dist_checkpointing.load(state, str(folder))
    for i, chunk in enumerate(engine.chunks):
        chunk.load_state_dict(loaded[f"model{i}"], strict=not without_frozen)
    if "optimizer" in loaded:
        load_state(engine.optimizer, loaded["optimizer"])
    if engine.teacher is not None:
        engine.teacher.load({owners[name]: whole for name, whole in loaded["teacher"].items()})
    for name, tensor in engine.objective.tensors().items() if engine.topology.on_last_stage else ():
        tensor.copy_(loaded["objective"][name])
    if same_layout:
        _restore_rng(loaded["rng"])
    return Progress(**common["progress"])


def _restore_rng(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])
    get_cuda_rng_tracker().set_states(state["tracker"])


def load_weights(
    chunks: list[VisionLanguageModel], config: Config, vocab_size: int, directory: str | Path
) -> list[str]:
    """Start from another run's weights (`--pretrained-checkpoint`), before the optimizer is built.

    Returns the names of parts that it does not have and that keep their fresh values; only the objective's own (and
    the visual path, where the other run was on text alone) may be missing, anything else raises `CheckpointError`.
    """
    folder, common = _open(directory, identity(config, vocab_size), starts=True)
    # Weights converted from a text model have no visual path: connector and patches start fresh, a tower has its own.
    visual = ("connector.", "vision_encoder.") if common["identity"]["vision"] == "none" else ()
    own = {weight.name for weight in config.objective.parameters(config)}
    stored = set(dist_checkpointing.load_tensors_metadata(str(folder)))
    fresh: set[str] = set()
    model = _model_state(chunks, common.get("without_frozen", False))
    for part in model.values():
        for name in list(part):
            key = part[name].key
            if key not in stored and not isinstance(part[name], ShardedObject):
                if key not in own and not key.startswith(visual) and not key.endswith(ADAPTERS):
                    raise CheckpointError(f"{folder} has no {key}; it is of another model")
                fresh.add(key)
                del part[name]
    loaded = dist_checkpointing.load(model, str(folder))
    for i, chunk in enumerate(chunks):
        chunk.load_state_dict(loaded[f"model{i}"], strict=not (fresh or common.get("without_frozen")))
        fill_new_rows(chunk, common["identity"]["vocab_size"], vocab_size)
    return sorted(fresh)
