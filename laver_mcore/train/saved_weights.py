"""Weights of another run or conversion: the newest whole checkpoint that fits, and what of it a model takes."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedObject

from laver_mcore.config.schema import Config
from laver_mcore.config.trainable import ADAPTERS
from laver_mcore.data.sequence.tokenizer import VISION_TOKENS, Tokenizer
from laver_mcore.megatron.checkpoints import CheckpointError, check_tokenizer, identity, may_start
from laver_mcore.megatron.intact import candidates, newest_intact
from laver_mcore.megatron.optimizer_state import beside, sharded_parameters
from laver_mcore.megatron.unpickling import reading
from laver_mcore.model.initialize import fill_new_rows
from laver_mcore.model.vision_language import VisionLanguageModel

logger = logging.getLogger(__name__)

EXTRA_STATE = "_extra_state"


def metadata() -> dict[str, Any]:
    """How Megatron lays out what it saves; a new one each time, for Megatron writes its process groups into it."""
    return {
        # Megatron 0.16's default for the distributed optimizer cannot be saved from CPU, and this one reshards fully.
        "distrib_optim_sharding_type": "fully_reshardable",
        "distrib_optim_fully_reshardable_mem_efficient": False,
        "chained_optim_avoid_prefix": True,
    }


def model_state(chunks: list[VisionLanguageModel], without_frozen: bool = False) -> dict[str, Any]:
    """Every chunk's weights; `without_frozen` leaves out the decoder's own, beside which LoRA's adapters stand.

    So does what Transformer Engine's modules keep for fp8 (`_extra_state`), which is empty without it: a checkpoint
    does not show which layers computed it.
    """
    states = {f"model{i}": chunk.sharded_state_dict(metadata=metadata()) for i, chunk in enumerate(chunks)}
    return {
        chunk: {k: v for k, v in state.items() if _is_kept(k, without_frozen)}
        for chunk, state in states.items()
    }


def _is_kept(name: str, without_frozen: bool) -> bool:
    if name.endswith(EXTRA_STATE):
        return False
    return not without_frozen or not name.startswith("language_model.") or name.endswith(ADAPTERS)


def put_weights(chunk: VisionLanguageModel, loaded: dict[str, Any], *, whole: bool) -> None:
    """Take loaded weights over; `CheckpointError` names what is missing of the `whole` model, or does not fit."""
    missing, unexpected = chunk.load_state_dict(loaded, strict=False)
    missing = [name for name in missing if not name.endswith(EXTRA_STATE)]
    if unexpected or (whole and missing):
        raise CheckpointError(
            f"the checkpoint is of another model: {(unexpected or missing)[0]} does not fit"
        )


def open_newest(
    directory: str | Path, wanted_identity: dict[str, Any], *, verify: bool, starts: bool = False
) -> tuple[Path, dict[str, Any]]:
    """Folder and common state of the newest whole checkpoint, after checking that it is of this model."""
    folder, passed = newest_intact(directory, verify=verify)
    for line in passed if dist.get_rank() == 0 else ():
        logger.warning("%s", line)
    with reading(folder):
        common = dist_checkpointing.load_common_state_dict(str(folder))
    # What an older one leaves out.
    before = {"family": "qwen2", "lora_rank": 0, "normalize_visual_tokens": False}
    before["lora_targets"] = wanted_identity.get("lora_targets")
    stored = before | common.get("identity", {})
    for name, wanted in wanted_identity.items():
        if starts and may_start(name, stored, wanted, len(VISION_TOKENS)):
            continue
        if stored.get(name) != wanted:
            raise CheckpointError(
                f"{folder} is of another model: it has {name}={stored.get(name)!r}, this recipe {name}={wanted!r}"
            )
    return folder, common


def lacks_frozen(directory: str | Path, *, verify: bool) -> bool:
    """Whether the newest checkpoint of a run holds LoRA's adapters without the weights beside which they stand."""
    if not candidates(directory):
        return False
    return bool(_common(directory, verify)[1].get("without_frozen", False))


def check_trained_with(directory: str | Path, config: Config, tokenizer: Tokenizer) -> None:
    """`CheckpointError` where the newest checkpoint of a run was trained with a tokenizer of other content."""
    folder, common = _common(directory, verify=False)  # its weights are loaded next, and verified
    check_tokenizer(folder, common, config.data.tokenizer_model, tokenizer.fingerprint())


def _common(directory: str | Path, verify: bool) -> tuple[Path, dict[str, Any]]:
    folder, _ = newest_intact(directory, verify=verify)
    with reading(folder):
        return folder, dist_checkpointing.load_common_state_dict(str(folder))


def load_weights(
    chunks: list[VisionLanguageModel], config: Config, vocab_size: int, directory: str | Path
) -> list[str]:
    """Start from another run's weights (`--pretrained-checkpoint`), before the optimizer is built.

    Returns the names of parts that it does not have and that keep their fresh values; only the objective's own (and
    the visual path, where the other run was on text alone) may be missing, anything else raises `CheckpointError`.
    """
    folder, common = open_newest(
        directory, identity(config, vocab_size), verify=config.run.verify_checkpoint, starts=True
    )
    # Weights converted from a text model have no visual path: connector and patches start fresh, a tower has its own.
    visual = ("connector.", "vision_encoder.") if common["identity"]["vision"] == "none" else ()
    own = {weight.name for weight in config.objective.parameters(config)}
    with reading(folder):
        stored = set(dist_checkpointing.load_tensors_metadata(str(folder)))
    fresh: set[str] = set()
    model = model_state(chunks, common.get("without_frozen", False))
    for part in model.values():
        for name in list(part):
            key = part[name].key
            if key not in stored and not isinstance(part[name], ShardedObject):
                if key not in own and not key.startswith(visual) and not key.endswith(ADAPTERS):
                    raise CheckpointError(f"{folder} has no {key}; it is of another model")
                fresh.add(key)
                del part[name]
    with reading(folder):
        loaded = dist_checkpointing.load(model, str(folder))
    for i, chunk in enumerate(chunks):
        put_weights(chunk, loaded[f"model{i}"], whole=not (fresh or common.get("without_frozen")))
        fill_new_rows(chunk, common["identity"]["vocab_size"], vocab_size)
    return sorted(fresh)


def teacher_state(
    model: dict[str, Any],
    averages: dict[torch.nn.Parameter, torch.Tensor],
    keeps: Callable[[Any], bool | None] = lambda _: None,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Whole averages under the model's own sharding, each key prefixed with `teacher.`; and whose each entry is.

    `keeps` says of a parameter what `beside` asks of it.
    """
    state: dict[str, Any] = {}
    owners: dict[str, Any] = {}
    for sharded in sharded_parameters(model):
        if sharded.data in averages:
            # Layers share a key and differ by offset, so the entry is named by its place in the dictionary.
            name, parameter = str(len(state)), sharded.data
            state[name] = beside(sharded, "teacher", averages[parameter], keeps=keeps(parameter))
            owners[name] = parameter
    return state, owners


def load_teacher(
    chunks: list[VisionLanguageModel], config: Config, vocab_size: int, directory: str | Path
) -> None:
    """Put the EMA weights of the run's newest checkpoint in the place of those that they are an average of.

    Raises `CheckpointError` where the run had no teacher.
    """
    folder, common = open_newest(directory, identity(config, vocab_size), verify=config.run.verify_checkpoint)
    with reading(folder):
        stored = set(dist_checkpointing.load_tensors_metadata(str(folder)))
    model = model_state(chunks, common.get("without_frozen", False))
    averaged = [s.data for s in sharded_parameters(model) if f"teacher.{s.key}" in stored]
    state, owners = teacher_state(model, {parameter: torch.empty(parameter.shape) for parameter in averaged})
    if not state:
        raise CheckpointError(f"{folder} holds no teacher")
    with reading(folder):
        loaded = dist_checkpointing.load(state, str(folder))
    with torch.no_grad():
        for name, parameter in owners.items():
            parameter.copy_(loaded[name].view(parameter.shape))
