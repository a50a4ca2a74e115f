"""`--dry-run`: build and validate everything, print parameters and memory per rank, train nothing.

Models are built on the meta device inside a pretended process group, one for each pipeline rank: a 7B recipe is
described on a laptop without allocating a weight.
"""

import os
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from laver_mcore import cpu, parallel
from laver_mcore.build import build_chunks, build_data, build_tokenizer, resolve_vocab_size
from laver_mcore.config.checks import check_world
from laver_mcore.config.schema import Config
from laver_mcore.model.parameters import Part, format_trainable, freeze_local, merge_parts, named_parameters
from laver_mcore.model.teacher import AVERAGED
from laver_mcore.parallel import Topology
from laver_mcore.run import check_save_folder

GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class RankMemory:
    """Bytes of one pipeline rank's tensors, by part; activations are estimated, all else is exact."""

    parameters: int
    trainable: int
    weights: int
    gradients: int
    optimizer: int
    teacher: int
    activations: int

    @property
    def total(self) -> int:
        """Sum over all parts, in bytes."""
        return self.weights + self.gradients + self.optimizer + self.teacher + self.activations


def activation_bytes(config: Config, topology: Topology) -> int:
    """Estimated bytes of saved activations at the peak of 1F1B on this pipeline rank.

    Source: Korthikanti et al. (arXiv 2205.05198), equations 2 and 4, without attention matrices (the kernels do not
    store them), for a SwiGLU layer with grouped queries, over the rows of dialogue and reconstruction.
    """
    model, parallel_config = config.model, config.parallel
    assert model.hidden_size and model.ffn_hidden_size and model.num_layers
    assert model.num_attention_heads and model.num_query_groups and model.kv_channels
    rows = config.train.micro_batch_size * config.data.seq_length * (2 if config.laver.laver else 1)
    width, tp = model.hidden_size, topology.tp_size
    heads = (2 * model.num_attention_heads + 2 * model.num_query_groups) * model.kv_channels
    split = 4 * width + heads + 4 * model.ffn_hidden_size
    layer = split / tp if parallel_config.sequence_parallel else 4 * width + (split - 4 * width) / tp
    if parallel_config.recompute_granularity == "full":
        layer = width / (tp if parallel_config.sequence_parallel else 1)
    layers = model.num_layers // topology.pp_size
    in_flight = topology.pp_size - topology.pp_rank
    element = 2 if config.train.bf16 else 4
    return int(rows * layer * layers * in_flight * element)


def rank_memory(
    config: Config, topology: Topology, vocab_size: int
) -> tuple[RankMemory, tuple[list[str], list[Part]]]:
    """Memory of this (pretended) rank, and its contribution to the table of what trains."""
    chunks = build_chunks(config, topology, vocab_size)
    contribution = freeze_local(chunks, config.train.trainable, topology)
    element = 2 if config.train.bf16 else 4
    counts = {"all": 0, "trainable": 0, "averaged": 0}
    for item in named_parameters(chunks, topology):
        number = item.parameter.numel()
        counts["all"] += number
        counts["trainable"] += number if item.parameter.requires_grad else 0
        counts["averaged"] += number if item.name.startswith(AVERAGED) else 0
    shards = topology.dp_size if config.parallel.use_distributed_optimizer else 1
    per_parameter = 8 + (4 if config.train.bf16 else 0)  # two moments, and fp32 masters
    compute_copy = 2 if config.train.bf16 else 0
    return (
        RankMemory(
            parameters=counts["all"],
            trainable=counts["trainable"],
            weights=counts["all"] * element,
            gradients=counts["trainable"] * 4,
            optimizer=counts["trainable"] * per_parameter // shards,
            teacher=counts["averaged"] * (4 + compute_copy) if config.laver.laver else 0,
            activations=activation_bytes(config, topology),
        ),
        contribution,
    )


def _pretend(config: Config, world_size: int, rank: int) -> Topology:
    if dist.is_initialized():
        parallel.shut_down()
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    return parallel.build_topology(config.parallel, torch.device("meta"))


def dry_run(config: Config) -> int:
    """Validate recipe, data and checkpoint folder; print the model's size and each pipeline rank's memory."""
    model_size = config.parallel.tensor_model_parallel_size * config.parallel.pipeline_model_parallel_size
    world_size = max(int(os.environ.get("WORLD_SIZE", "1")), model_size)
    dp_size = check_world(config, world_size)
    check_save_folder(config)
    tokenizer = build_tokenizer(config)
    data = build_data(config, tokenizer)
    vocab_size = resolve_vocab_size(config, tokenizer)
    cpu.install("meta")
    rows = []
    ranks_per_stage = world_size // config.parallel.pipeline_model_parallel_size
    for stage in range(config.parallel.pipeline_model_parallel_size):
        topology = _pretend(config, world_size, stage * ranks_per_stage)
        rows.append(rank_memory(config, topology, vocab_size))
    parallel.shut_down()
    table = merge_parts([contribution for _, contribution in rows], config.train.trainable)
    print(
        f"{config.model.model}: {len(data.samples):,} dialogues, {data.rows_per_epoch(0):,} packed rows an epoch"
    )
    print(
        f"TP {config.parallel.tensor_model_parallel_size} x PP {len(rows)} x DP {dp_size}; this dry run trains nothing"
    )
    print()
    print(format_trainable(table))
    print("\nmemory per rank in GiB (activations estimated)")
    names = ("weights", "gradients", "optimizer", "teacher", "activations", "total")
    print(f"{'pipeline rank':<16}" + "".join(f"{name:>13}" for name in names))
    for stage, (memory, _) in enumerate(rows):
        print(f"{stage:<16}" + "".join(f"{getattr(memory, name) / GIB:>13.2f}" for name in names))
    return 0
