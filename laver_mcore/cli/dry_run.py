"""`--dry-run`: build and validate everything, print parameters, memory per rank and a step's FLOPs, train nothing.

Models are built on the meta device inside a pretended process group, one for each pipeline rank: a 7B recipe is
described on a laptop without allocating a weight.
"""

import os

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from laver_mcore.accounting.flops import step_flops
from laver_mcore.accounting.memory import rank_memory
from laver_mcore.accounting.tables import in_units, memory_table
from laver_mcore.accounting.typical import typical_mix, typical_work
from laver_mcore.cli.assets import how_to_get, missing
from laver_mcore.cli.run import check_save_folder, passes
from laver_mcore.config.checks import check_world
from laver_mcore.config.presets import model_name
from laver_mcore.config.schema import Config, ParallelConfig
from laver_mcore.megatron import cpu, parallel
from laver_mcore.megatron.parallel import Topology
from laver_mcore.model.parameters import Part, format_trainable, freeze_local, merge_parts, training_of
from laver_mcore.shapes.weights import list_weights
from laver_mcore.train.build import build_chunks, build_data, build_tokenizer, resolve_vocab_size


def describe_rank(
    config: Config, topology: Topology, vocab_size: int
) -> tuple[int, tuple[list[str], list[Part]]]:
    """Parameters that this (pretended) rank holds, and its contribution to the table of what trains."""
    chunks = build_chunks(config, topology, vocab_size)
    contribution = freeze_local(chunks, training_of(config), topology)
    return sum(p.numel() for chunk in chunks for p in chunk.parameters()), contribution


def _step_lines(config: Config, vocab_size: int, dp_size: int) -> list[str]:
    """Memory by pipeline rank, and a step's FLOPs, of a typical batch."""
    mix = typical_mix(config)
    work = typical_work(config, mix)
    num_micro_batches = config.train.global_batch_size // (config.train.micro_batch_size * dp_size)
    memories = [
        rank_memory(
            config, vocab_size, work, pp_rank=rank, dp_size=dp_size, num_micro_batches=num_micro_batches
        )
        for rank in range(config.parallel.pipeline_model_parallel_size)
    ]
    flops = step_flops(config, vocab_size, work).total
    model, hardware = (in_units(f * num_micro_batches * dp_size) for f in (flops.model, flops.hardware))
    return [
        f"\nfor rows of {mix.images_per_row} images of {mix.image_tokens} visual tokens:",
        f"{model} useful, {hardware} with padding and recompute, in a step",
        "GiB per rank (activations, logits and workspace estimated)",
        *memory_table(memories),
    ]


def _pretend(config: Config, world_size: int, rank: int) -> Topology:
    if dist.is_initialized():
        parallel.shut_down()
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    return parallel.build_topology(config.parallel, torch.device("meta"))


def _layout_line(sizes: ParallelConfig, dp_size: int) -> str:
    return (
        f"TP {sizes.tensor_model_parallel_size} x PP {sizes.pipeline_model_parallel_size} x "
        f"CP {sizes.context_parallel_size} x DP {dp_size}; this dry run trains nothing"
    )


def _on_paper(config: Config, dp_size: int, absent: dict[str, list[str]]) -> int:
    """What can be said before the downloads: shapes as published, memory, FLOPs; and what has to be fetched."""
    vocab_size = config.model.vocab_size
    assert vocab_size is not None
    weights = list_weights(config, vocab_size)
    total, trained = sum(w.size for w in weights), sum(w.size for w in weights if w.trains)
    print(f"{model_name(config.model)}: {total:,} parameters, {trained:,} of them trained")
    print(f"{_layout_line(config.parallel, dp_size)}, and shapes are as published")
    print("\n".join(_step_lines(config, vocab_size, dp_size)))
    print("\nnot here yet:")
    for path, flags in absent.items():
        names = ", ".join(f"--{flag.replace('_', '-')}" for flag in flags)
        print(f"  {path} ({names}): {how_to_get(path)}")
    return 0


def dry_run(config: Config) -> int:
    """Validate recipe, data and checkpoint folder; print the model's size and each pipeline rank's memory."""
    sizes = config.parallel
    model_size = (
        sizes.tensor_model_parallel_size * sizes.pipeline_model_parallel_size * sizes.context_parallel_size
    )
    world_size = max(int(os.environ.get("WORLD_SIZE", "1")), model_size)
    dp_size = check_world(config, world_size)
    check_save_folder(config)
    absent = missing(config)
    if absent and config.model.vocab_size is not None:
        return _on_paper(config, dp_size, absent)
    tokenizer = build_tokenizer(config)
    data = build_data(config, tokenizer)
    vocab_size = resolve_vocab_size(config, tokenizer)
    cpu.install("meta")
    rows = []
    ranks_per_stage = world_size // config.parallel.pipeline_model_parallel_size
    for stage in range(config.parallel.pipeline_model_parallel_size):
        topology = _pretend(config, world_size, stage * ranks_per_stage)
        rows.append(describe_rank(config, topology, vocab_size))
    parallel.shut_down()
    table = merge_parts([contribution for _, contribution in rows], training_of(config))
    print(
        f"{model_name(config.model)}: {len(data.samples):,} dialogues, {data.rows_per_epoch(0):,} packed rows an epoch"
    )
    print(passes(config.train, data))
    print(_layout_line(sizes, dp_size))
    print()
    print(format_trainable(table))
    print("\n".join(_step_lines(config, vocab_size, dp_size)))
    return 0
