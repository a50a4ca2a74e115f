"""LoRA's adapters out of a checkpoint: merged into the weights beside which they stand, or as a directory of `peft`.

    lora_a [n r, in], lora_b [out, r] of one of our layers  ->  lora_A [r, in], lora_B [out_i, r] of n of theirs

An adapter's checkpoint need not hold the frozen weights; they are read from where the run took them.
"""

import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from laver_mcore.config.schema import Config, ModelConfig
from laver_mcore.convert.distributed_checkpoint import CheckpointReader
from laver_mcore.convert.errors import ConversionError
from laver_mcore.convert.names import (
    LAYERS,
    Entry,
    checkpoint_key,
    entries,
    split,
    their_shapes,
    with_new_rows,
)
from laver_mcore.convert.safetensors_directory import TensorToWrite, open_weights, write_file

Theirs = Callable[[Entry], list[torch.Tensor]]
"""Hugging Face's tensors of one entry of the table, frozen ones."""
OpenRun = Callable[[str | Path], tuple[Config, CheckpointReader]]


def layer_of(entry: Entry) -> str:
    """The Megatron layer whose weight an entry is, such as linear_qkv; empty for other parameters."""
    name, _, end = entry.ours.rpartition(".")
    return name.rpartition(".")[2] if end == "weight" else ""


def adapted(entry: Entry, model: ModelConfig) -> tuple[int, ...]:
    """Which of Hugging Face's projections in an entry have an adapter."""
    return model.adapted_layers.get(layer_of(entry), ())


def read_adapter(
    entry: Entry, reader: CheckpointReader, model: ModelConfig, teacher: bool
) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
    """Each of the `adapted` projections -> (A [r, in], B [out, r]), fp32."""
    assert entry.layer is not None
    rest = entry.ours.removeprefix(f"{LAYERS}{entry.layer}.").removesuffix("weight")
    prefix = ("teacher." if teacher else "") + LAYERS + rest
    for name in ("lora_a", "lora_b"):
        if prefix + name not in reader:
            raise ConversionError(
                f"{reader.folder} has no {prefix}{name}" + (": the run had no teacher" if teacher else "")
            )
    a, b = (reader.read(prefix + name, entry.layer).float() for name in ("lora_a", "lora_b"))
    indices = adapted(entry, model)
    pairs = zip(a.chunk(len(indices)), split(entry, b, model, indices), strict=True)
    return dict(zip(indices, pairs, strict=True))


def merged_tensors(
    config: Config,
    reader: CheckpointReader,
    vocab_size: int,
    *,
    open_run: OpenRun,
    dtype: torch.dtype | None = None,
    teacher: bool = False,
) -> list[TensorToWrite]:
    """Hugging Face's tensors of a decoder, each W + (alpha / rank) B A, computed when it is written."""
    model = config.model
    frozen = _frozen(config, reader, vocab_size, open_run)
    stored = torch.bfloat16 if config.train.bf16 else torch.float32
    tensors = []
    for entry in entries(model):
        for index, (name, shape) in enumerate(
            zip(entry.theirs, their_shapes(entry, model, vocab_size), strict=True)
        ):
            blocks = partial(_merge, entry, index, frozen, reader, model, teacher)
            tensors.append(TensorToWrite(name=name, shape=shape, dtype=dtype or stored, blocks=blocks))
    return tensors


def _merge(
    entry: Entry, index: int, frozen: Theirs, reader: CheckpointReader, model: ModelConfig, teacher: bool
) -> Iterator[torch.Tensor]:
    weight = frozen(entry)[index]
    if index in adapted(entry, model):
        a, b = read_adapter(entry, reader, model, teacher)[index]
        weight = weight.float() + model.lora_alpha / model.lora_rank * (b @ a)
    yield weight


def _frozen(config: Config, reader: CheckpointReader, vocab_size: int, open_run: OpenRun) -> Theirs:
    """Where the weights beside the adapters are read from: the checkpoint itself, or what the run started from."""
    model = config.model
    if not reader.common.get("without_frozen", False):

        def stored(entry: Entry) -> list[torch.Tensor]:
            whole = reader.read(checkpoint_key(entry), entry.layer)
            return split(entry, whole[:vocab_size] if entry.fusion == "vocabulary" else whole, model)

        return stored
    if config.run.pretrained_checkpoint:
        before, other = open_run(config.run.pretrained_checkpoint)
        old = min(vocab_size, other.common["identity"]["vocab_size"])
        return _grown(_frozen(before, other, old, open_run), vocab_size)
    if not config.run.hf_path:
        raise ConversionError(
            f"{reader.folder} holds adapters alone and the run began with random weights; train with --save-frozen"
        )
    weights = open_weights(config.run.hf_path, allow_pickle=config.run.allow_pickle)
    return _grown(lambda entry: [weights[name] for name in entry.theirs], vocab_size)


def _grown(frozen: Theirs, vocab_size: int) -> Theirs:
    def found(entry: Entry) -> list[torch.Tensor]:
        tensors = frozen(entry)
        return [with_new_rows(t, vocab_size) for t in tensors] if entry.fusion == "vocabulary" else tensors

    return found


def write_adapter(
    config: Config,
    reader: CheckpointReader,
    folder: Path,
    *,
    dtype: torch.dtype | None = None,
    teacher: bool = False,
) -> None:
    """Write adapter_config.json and adapter_model.safetensors, as `peft` reads them."""
    model = config.model
    if not model.lora_rank:
        raise ConversionError(f"{reader.folder} has no adapters: the run was trained without --lora-rank")
    tensors, targets = [], set()
    for entry in entries(model):
        for index in adapted(entry, model):
            name, (rows, columns) = entry.theirs[index], their_shapes(entry, model, 0)[index]
            targets.add(name.split(".")[-2])
            for place, letter, shape in (
                (0, "A", (model.lora_rank, columns)),
                (1, "B", (rows, model.lora_rank)),
            ):
                tensors.append(
                    TensorToWrite(
                        name=f"base_model.model.{name.removesuffix('weight')}lora_{letter}.weight",
                        shape=shape,
                        dtype=dtype or torch.float32,
                        blocks=partial(_one, entry, index, place, reader, model, teacher),
                    )
                )
    content: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": config.run.hf_path,
        "r": model.lora_rank,
        "lora_alpha": model.lora_alpha,
        "lora_dropout": model.lora_dropout,
        "target_modules": sorted(targets),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    (folder / "adapter_config.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    write_file(folder / "adapter_model.safetensors", tensors)


def _one(
    entry: Entry, index: int, place: int, reader: CheckpointReader, model: ModelConfig, teacher: bool
) -> Iterator[torch.Tensor]:
    yield read_adapter(entry, reader, model, teacher)[index][place]
