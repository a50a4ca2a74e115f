"""Decoders in Hugging Face directories <-> distributed checkpoints, on CPU, a block of a tensor at a time.

    import_decoder   HF directory -> DIR/iter_0000000 (release weights: iteration 0, no optimizer) +
    DIR/config.yaml export_decoder   a run's newest checkpoint, or an imported one -> HF directory (the
    decoder alone)

Either is written beside its destination first and moved there when it is complete.
"""

import io
import json
import logging
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from laver_mcore.config.hugging_face import read_shape, text_config
from laver_mcore.config.load import from_recipe, to_yaml
from laver_mcore.config.presets import fill_from_preset
from laver_mcore.config.schema import Config, ModelConfig, VisionConfig
from laver_mcore.convert.distributed_checkpoint import Block, CheckpointReader, row_blocks, write_checkpoint
from laver_mcore.convert.errors import ConversionError
from laver_mcore.convert.lora import merged_tensors
from laver_mcore.convert.names import (
    LAYERS,
    Entry,
    checkpoint_key,
    entries,
    fuse,
    our_shape,
    split,
    their_shapes,
)
from laver_mcore.convert.safetensors_directory import (
    TensorToWrite,
    Weights,
    open_weights,
    read_json,
    write_safetensors,
)
from laver_mcore.convert.source_tensors import SourceTensors, account, refuse_doubles
from laver_mcore.megatron import checkpoints
from laver_mcore.megatron.intact import newest_intact

logger = logging.getLogger(__name__)

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
COMPANIONS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
    "chat_template.jinja",
    "chat_template.json",
)
"""Files of a Hugging Face directory that go with its weights unchanged."""
CARRIED = (
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "max_position_embeddings",
    "max_window_layers",
    "initializer_range",
    "attention_dropout",
)
"""Settings of a source's config.json that this engine neither uses nor changes."""
# Layers without weights of their own still have an entry in Megatron's checkpoints.
_EXTRA_STATES = (
    "self_attention.linear_proj",
    "self_attention.linear_qkv",
    "mlp.linear_fc1",
    "mlp.linear_fc2",
)


def import_decoder(
    hf_path: str | Path, save: str | Path, *, dtype: torch.dtype | None = None, allow_pickle: bool = False
) -> ModelConfig:
    """Convert a decoder's directory into a checkpoint under `save`; `dtype` casts, None keeps each tensor's
    own.

    Returns the decoder's shape. Raises `ConfigError` (`ConversionError`) before anything is written.
    """
    model = fill_from_preset(ModelConfig(), read_shape(hf_path))
    assert model.vocab_size is not None
    weights = open_weights(hf_path, allow_pickle=allow_pickle)
    logger.info("%s: %s", hf_path, check_weights(weights, model, model.vocab_size, hf_path))
    if dtype is None:
        refuse_doubles(weights, hf_path)
    config = Config(model=model, vision=VisionConfig(vision="none"))
    blocks = [block for entry in entries(model) for block in _blocks_of(entry, weights, model, dtype)]
    common = {
        "identity": checkpoints.identity(config, model.vocab_size),
        "progress": {"iteration": 0, "consumed_rows": 0},
        "layout": [1, 1, 1],
        "data": "",
        "content_metadata": {},
    }
    with written_whole(Path(save)) as folder:
        write_checkpoint(checkpoints.checkpoint_folder(folder, 0), blocks, _extra_states(model), common)
        (folder / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
        copy_companions(Path(hf_path), folder / "hf")
        copy_settings(Path(hf_path), folder / "hf")
        (folder / checkpoints.TRACKER).write_text("0", encoding="utf-8")
    return model


def check_weights(weights: Weights, model: ModelConfig, vocab_size: int, where: str | Path) -> SourceTensors:
    """What becomes of each tensor; `ConversionError` unless the directory holds exactly this decoder."""
    expected: dict[str, tuple[int, ...]] = {}
    for entry in entries(model):
        expected.update(zip(entry.theirs, their_shapes(entry, model, vocab_size), strict=True))
    tied = not model.untie_embeddings_and_output_weights
    return account(weights, expected, where, tied=tied, family=model.family)


def _blocks_of(
    entry: Entry, weights: Weights, model: ModelConfig, dtype: torch.dtype | None
) -> Iterator[Block]:
    """The blocks of one entry: gate and up projections by themselves, the vocabulary in ranges of rows."""
    assert model.num_layers is not None
    assert model.vocab_size is not None
    shape = our_shape(entry, model, model.vocab_size)
    stored = weights.describe(entry.theirs[0])[1]

    def block(start: int, stop: int, fetch: Callable[[], torch.Tensor]) -> Block:
        stack = () if entry.layer is None else (1,)
        return Block(
            key=checkpoint_key(entry),
            global_shape=(model.num_layers, *shape) if entry.layer is not None else shape,  # type: ignore[arg-type]
            dtype=dtype or stored,
            offsets=(*((entry.layer,) if entry.layer is not None else ()), start, *[0] * (len(shape) - 1)),
            sizes=(*stack, stop - start, *shape[1:]),
            fetch=fetch,
        )

    if entry.fusion == "vocabulary":
        for start, stop in row_blocks(shape, stored):
            yield block(start, stop, partial(weights.rows, entry.theirs[0], start, stop))
    elif entry.fusion == "gate_up":
        half = shape[0] // 2
        for index, name in enumerate(entry.theirs):
            yield block(index * half, (index + 1) * half, partial(weights.__getitem__, name))
    else:
        yield block(0, shape[0], lambda: fuse(entry, [weights[name] for name in entry.theirs], model))


def _extra_states(model: ModelConfig) -> dict[str, bytes]:
    empty = io.BytesIO()
    torch.save([None], empty)
    layers = model.num_layers
    assert layers is not None
    return {
        f"{LAYERS}{name}._extra_state/shard_{layer}_{layers}": empty.getvalue()
        for layer in range(layers)
        for name in _EXTRA_STATES
    }


def export_decoder(
    load: str | Path,
    save: str | Path,
    *,
    dtype: torch.dtype | None = None,
    teacher: bool = False,
    companions: str | Path | None = None,
    beside: Callable[[Path], object] | None = None,
) -> None:
    """Write the decoder of a run's newest checkpoint as a directory; `teacher` takes the EMA weights.

    `companions` is a directory whose tokenizer and generation config go along; by default that of the model which the
    checkpoint was converted from, or what `beside` writes. Raises `ConfigError`.
    """
    config, reader = open_run(load)
    vocab_size = reader.common["identity"]["vocab_size"]
    tensors = run_tensors(config, reader, vocab_size, dtype=dtype, teacher=teacher)
    source = Path(companions) if companions else Path(load) / "hf"
    with written_whole(Path(save)) as folder:
        content = text_config(config.model, vocab_size) | carried_settings(source)
        content["dtype"] = str(tensors[0].dtype).removeprefix("torch.")
        (folder / "config.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        if source.is_dir() or beside is None:
            copy_companions(source, folder)
        else:
            beside(folder)
        write_safetensors(folder, tensors)


def open_run(load: str | Path) -> tuple[Config, CheckpointReader]:
    """Recipe and newest checkpoint of a run's folder."""
    folder, passed = newest_intact(load)
    for line in passed:
        logger.warning("%s", line)
    config = from_recipe(Path(load) / "config.yaml")
    config = replace(config, model=fill_from_preset(config.model))
    return config, CheckpointReader(folder)


def run_tensors(
    config: Config,
    reader: CheckpointReader,
    vocab_size: int,
    *,
    dtype: torch.dtype | None = None,
    teacher: bool = False,
) -> list[TensorToWrite]:
    """Hugging Face's tensors of a run's decoder; with LoRA, its adapters merged into what they stand beside."""
    if config.model.lora_rank:
        return merged_tensors(config, reader, vocab_size, open_run=open_run, dtype=dtype, teacher=teacher)
    return decoder_tensors(config.model, reader, vocab_size, dtype=dtype, teacher=teacher)


def decoder_tensors(
    model: ModelConfig,
    reader: CheckpointReader,
    vocab_size: int,
    *,
    dtype: torch.dtype | None = None,
    teacher: bool = False,
) -> list[TensorToWrite]:
    """Hugging Face's tensors of the decoder in a checkpoint, each read when it is written."""
    prefix = "teacher." if teacher else ""
    tensors = []
    for entry in entries(model):
        key = prefix + checkpoint_key(entry)
        if key not in reader:
            raise ConversionError(
                f"{reader.folder} has no {key}" + (": the run had no teacher" if teacher else "")
            )
        stored = reader.dtype(key)
        for index, (name, shape) in enumerate(
            zip(entry.theirs, their_shapes(entry, model, vocab_size), strict=True)
        ):
            blocks = partial(_read_theirs, entry, index, shape, key, reader, model)
            tensors.append(TensorToWrite(name=name, shape=shape, dtype=dtype or stored, blocks=blocks))
    return tensors


def _read_theirs(
    entry: Entry, index: int, shape: tuple[int, ...], key: str, reader: CheckpointReader, model: ModelConfig
) -> Iterator[torch.Tensor]:
    """One of an entry's tensors; of the padded vocabulary only the rows that are tokens."""
    if entry.fusion == "vocabulary":
        for start, stop in row_blocks(shape, reader.dtype(key)):
            yield reader.read(key, rows=(start, stop))
    elif entry.fusion == "gate_up":
        yield reader.read(key, entry.layer, rows=(index * shape[0], (index + 1) * shape[0]))
    else:
        yield split(entry, reader.read(key, entry.layer), model)[index]


def copy_companions(source: Path, destination: Path) -> None:
    """Copy tokenizer and generation settings, as far as `source` has them."""
    found = [name for name in COMPANIONS if (source / name).is_file()]
    if found:
        destination.mkdir(exist_ok=True)
    for name in found:
        shutil.copyfile(source / name, destination / name)


def copy_settings(source: Path, destination: Path) -> None:
    """Keep the source's config.json beside its companions: what this engine does not use goes back with an export."""
    destination.mkdir(exist_ok=True)
    shutil.copyfile(source / "config.json", destination / "config.json")


def carried_settings(source: Path) -> dict[str, Any]:
    """What an export says as the source's config.json does; empty where there is none."""
    file = source / "config.json"
    content = read_json(file) if file.is_file() else {}
    return {name: content[name] for name in CARRIED if content.get(name) is not None}


@contextmanager
def written_whole(destination: Path) -> Iterator[Path]:
    """A folder to write into, moved to `destination` when all went well and removed when not."""
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise ConversionError(f"{destination} exists and is not empty; choose another --save folder")
    partial_folder = destination.with_name(destination.name + ".partial")
    shutil.rmtree(partial_folder, ignore_errors=True)
    partial_folder.mkdir(parents=True)
    try:
        yield partial_folder
        if destination.exists():
            destination.rmdir()
        partial_folder.replace(destination)
    finally:
        shutil.rmtree(partial_folder, ignore_errors=True)
