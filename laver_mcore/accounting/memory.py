"""Bytes on one rank, by part: exact for everything that stays, estimated for what a step allocates.

Parameters, gradients, optimizer state and the teacher follow from the list of weights. Activations are counted tensor
by tensor as Megatron's layers and this project's kernels save them (the principle of Korthikanti et al.,
arXiv 2205.05198; there are no attention matrices here).
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

from laver_mcore.accounting.saved import layer_sizes, num_chunks, saved_per_row, whole_layer_per_row
from laver_mcore.accounting.work import StepWork
from laver_mcore.config.schema import Config, ParallelConfig, TrainConfig
from laver_mcore.shapes.towers import tower_shape
from laver_mcore.shapes.weights import EMBEDDING, HEAD, Weight, frozen_tower, list_weights, target_tower

GRADIENT = 4
"""Bytes of a gradient: reduced and summed in fp32."""
MOMENTS = 8
"""Bytes of Adam's two moments."""
MASTER = 4
"""Bytes of an fp32 master, and of the teacher's average."""
LOGIT_ROWS = 4096
"""Rows of logits that the LM head's kernel holds at a time."""
GRAM_WORKSPACE = 256 * 2**20
"""Most bytes of Gram weights at a time."""
GATHER_WORKSPACE = 64 * 2**20
"""Buffer through which the teacher's shards are gathered."""


@dataclass(frozen=True, kw_only=True)
class RankMemory:
    """Bytes of one pipeline rank's tensors, by part."""

    weights: int
    gradients: int
    optimizer: int
    teacher: int
    activations: int
    logits: int
    workspace: int

    @property
    def total(self) -> int:
        """Sum over all parts, in bytes."""
        return sum(getattr(self, name) for name in MEMORY_PARTS)


MEMORY_PARTS = tuple(f.name for f in fields(RankMemory))


@dataclass(frozen=True, kw_only=True)
class Held:
    """Numbers of parameters on one rank."""

    all: int
    trainable: int
    averaged: int
    """Those that the teacher averages; frozen ones are their own average."""
    largest: int
    """The largest single one that trains."""
    fp8_bytes: int
    """Codes (1 byte) and scales (4 bytes a row) of the decoder's matrices, where the teacher computes in fp8."""


def holdings(config: Config, vocab_size: int) -> tuple[Held, ...]:
    """What one tensor-parallel rank of each pipeline rank holds; `vocab_size` is the one before padding."""
    parallel = config.parallel
    # Layouts that a planner tries differ in much that does not matter here.
    few = ParallelConfig(
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        num_virtual_stages_per_pipeline_rank=parallel.num_virtual_stages_per_pipeline_rank,
    )
    kept = TrainConfig(trainable=config.train.trainable)
    return _holdings(replace(config, parallel=few, train=kept), vocab_size)


@functools.lru_cache(maxsize=16)
def _holdings(config: Config, vocab_size: int) -> tuple[Held, ...]:
    parallel = config.parallel
    sizes: list[list[tuple[Weight, int]]] = [[] for _ in range(parallel.pipeline_model_parallel_size)]
    tied = not config.model.untie_embeddings_and_output_weights
    teacher = config.objective.teacher(config)
    for weight in list_weights(config, vocab_size):
        size = weight.size // (parallel.tensor_model_parallel_size if weight.split else 1)
        stages = {_stage_of(weight, config)}
        if tied and weight.name == EMBEDDING:
            stages.add(len(sizes) - 1)  # the last stage holds a copy of a tied embedding
        for stage in stages:
            sizes[stage].append((weight, size))
    return tuple(
        Held(
            all=sum(size for _, size in mine),
            trainable=sum(size for w, size in mine if w.trains),
            averaged=sum(size for w, size in mine if w.averaged),
            largest=max((size for w, size in mine if w.trains), default=0),
            fp8_bytes=sum(size + 4 * _rows(w, config) for w, size in mine if w.rows == "decoder")
            if teacher is not None and teacher.precision == "fp8"
            else 0,
        )
        for mine in sizes
    )


def _rows(weight: Weight, config: Config) -> int:
    """Rows of a decoder's matrix on one rank: tensor parallelism cuts the rows of these two, of others the columns."""
    cut = weight.name.endswith(("linear_qkv.weight", "linear_fc1.weight"))
    return weight.shape[0] // (config.parallel.tensor_model_parallel_size if cut else 1)


def _stage_of(weight: Weight, config: Config) -> int:
    """The pipeline rank that holds a weight."""
    pp = config.parallel.pipeline_model_parallel_size
    if weight.place != "layer":
        return 0 if weight.place == "first" else pp - 1
    return weight.layer // ((config.model.num_layers or 0) // num_chunks(config)) % pp


def state_bytes(config: Config, held: Held, dp_size: int) -> dict[str, int]:
    """Bytes of what stays from step to step, by part; a data-parallel rank's mean share where it is sharded."""
    element = 2 if config.train.bf16 else 4
    parallel = config.parallel
    shards = dp_size * parallel.context_parallel_size if parallel.use_distributed_optimizer else 1
    masters = MASTER if config.train.bf16 else 0
    # In fp32 an average that is whole computes itself; otherwise the teacher computes with a whole copy.
    teacher = config.objective.teacher(config)
    offload = teacher is not None and teacher.offload
    copy = element if config.train.bf16 or shards > 1 or offload else 0
    average = 0 if offload else MASTER
    return dict(
        weights=element * held.all,
        gradients=GRADIENT * held.trainable,
        optimizer=(MOMENTS + masters) * held.trainable // shards,
        teacher=held.averaged * average // shards + copy * held.averaged + held.fp8_bytes,
    )


def rank_memory(
    config: Config,
    vocab_size: int,
    work: StepWork,
    *,
    pp_rank: int,
    dp_size: int,
    num_micro_batches: int,
) -> RankMemory:
    """Peak bytes on pipeline rank `pp_rank` of a step whose micro-batches hold `work` each."""
    held, weights = holdings(config, vocab_size)[pp_rank], list_weights(config, vocab_size)
    element = 2 if config.train.bf16 else 4
    parallel = config.parallel
    last = pp_rank == parallel.pipeline_model_parallel_size - 1
    in_flight = chunks_in_flight(config, pp_rank, num_micro_batches)
    layers = (config.model.num_layers or 0) // num_chunks(config)
    rows = (
        work.dialogue_rows
        + work.student_padding
        + (work.visual_tokens if config.objective.reconstructs else 0)
    )
    activations = in_flight * layers * rows / parallel.context_parallel_size * saved_per_row(config)
    activations += _edges(config, weights, work, rows, pp_rank, in_flight)
    learns = any(w.trains for w in weights)
    stays = state_bytes(config, held, dp_size)
    stays["weights"] += element * _frozen_encoder(config) if pp_rank == 0 else 0
    return RankMemory(
        **stays,
        activations=int(element * activations) if learns else 0,
        logits=_logits(config, weights, work, element) if last else 0,
        workspace=_workspace(config, work, rows, element, held, last),
    )


def _frozen_encoder(config: Config) -> int:
    """Parameters of the encoder that gives the objective its targets, whole on every rank of the first stage."""
    tower = target_tower(config)
    return 0 if tower is None else sum(weight.size for weight in frozen_tower(tower))


def chunks_in_flight(config: Config, pp_rank: int, num_micro_batches: int) -> int:
    """Model chunks' worth of activations that a pipeline rank holds at most.

    1F1B: one for every stage from here to the last. Interleaved (Narayanan et al., arXiv 2104.04473): its longer
    warm-up of 2 (p - rank - 1) + (v - 1) p chunks, and one more.
    """
    pp = config.parallel.pipeline_model_parallel_size
    vp = config.parallel.num_virtual_stages_per_pipeline_rank or 1
    warm_up = pp - pp_rank - 1 if vp == 1 else 2 * (pp - pp_rank - 1) + (vp - 1) * pp
    return min(warm_up + 1, num_micro_batches * vp)


def _edges(
    config: Config, weights: Sequence[Weight], work: StepWork, rows: int, pp_rank: int, in_flight: int
) -> float:
    """Numbers saved outside the layers: visual path on the first stage, heads on the last."""
    tp, along, width, *_ = layer_sizes(config)
    pp, cp = config.parallel.pipeline_model_parallel_size, config.parallel.context_parallel_size
    visual = work.visual_tokens
    teacher_rows = visual + work.teacher_padding if config.objective.teacher(config) else 0
    travelling = teacher_rows + visual * config.objective.travelling()
    saved = 0.0
    if pp_rank == 0:
        saved += (
            in_flight * (visual * _connector_per_token(config) + _tower(config, weights, work)) / (tp * cp)
        )
    else:  # the teacher's rows, and others, travel in the tensor that the first layer saves
        saved += in_flight * travelling * width / (along * cp)
    if pp_rank == pp - 1:
        saved += rows * (width / (along * cp) + width)  # the final norm's input and its gathered output
        saved += visual * config.objective.saved_per_visual_token(config)
        saved += work.supervised_rows / cp * 2 * width
    return saved


def _connector_per_token(config: Config) -> int:
    vision, tower = config.vision, tower_shape(config.vision)
    inner = vision.connector_hidden_size or config.model.hidden_size or 0
    if tower is not None:
        return tower.output_width + 2 * inner
    return 3 * vision.patch_size**2 + 4 * inner if vision.is_encoder_free else 0


def _tower(config: Config, weights: Sequence[Weight], work: StepWork) -> float:
    tower = tower_shape(config.vision)
    if tower is None or not any(w.trains and w.name.startswith("vision_encoder.") for w in weights):
        return 0.0
    return work.patches * tower.layers * (8 * tower.width + (4 if tower.gated else 2) * tower.ffn)


def _logits(config: Config, weights: Sequence[Weight], work: StepWork, element: int) -> int:
    """Logits of one chunk of rows, and the LM head's gradient as it is made and as it is scaled."""
    name = HEAD if config.model.untie_embeddings_and_output_weights else EMBEDDING
    (head,) = (w for w in weights if w.name == name)
    padded, width = head.shape
    share = work.supervised_rows // config.parallel.context_parallel_size
    rows = min(share, LOGIT_ROWS)
    made = 4 if share > LOGIT_ROWS else element  # several chunks are summed in fp32
    columns = padded // config.parallel.tensor_model_parallel_size
    return columns * (rows * element + (width * (made + element) if head.trains else 0))


def _workspace(config: Config, work: StepWork, rows: int, element: int, held: Held, last: bool) -> int:
    """What a backward needs at its widest besides, W of the Gram loss, buffers of the teacher's move."""
    tp, _, width, ffn, queries, _ = layer_sizes(config)
    cp = config.parallel.context_parallel_size
    rows = rows // cp
    # Gradients of the MLP's inner tensors; attention's partial sums of keys and values in fp32, one per query head.
    transient = rows * (element * (2 * width + 5 * ffn / tp) + 8 * queries / tp)
    if config.parallel.recompute_granularity == "full":
        transient += element * rows * whole_layer_per_row(config)
    transient += element * held.largest  # a gradient on its way into the fp32 buffer
    gram = min(GRAM_WORKSPACE, element * work.gram_pairs) if last else 0
    gather = GATHER_WORKSPACE if held.averaged else 0
    return int(transient + gram + gather)
