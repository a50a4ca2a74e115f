"""Memory and time of one layout on paper.

Time is counted per micro-batch and pipeline rank: matrix products and attention at assumed rates, what is moved between
them at the memory bandwidth, launches (`accounting/traffic.py`), collectives at the bandwidths of links, overlapped
only where the recipe overlaps the reduction of gradients or the gather of parameters; then the bubble of the pipeline,
the optimizer and the teacher.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from laver_mcore.accounting.devices import GIB, Gpu
from laver_mcore.accounting.flops import ADAM_BYTES, EMA_BYTES, StepFlops, step_flops
from laver_mcore.accounting.memory import GRADIENT, Held, RankMemory, holdings, rank_memory
from laver_mcore.accounting.traffic import accumulated_bytes, kernels, layer_bytes, layers_learn
from laver_mcore.accounting.typical import typical_work
from laver_mcore.accounting.work import StepWork
from laver_mcore.config.schema import Config
from laver_mcore.plan.layouts import NODE, Layout
from laver_mcore.plan.setting import Setting

RESERVED = 4 * GIB
"""Memory that CUDA, NCCL and fragmentation are assumed to take."""
BACKWARD_SHARE = 2 / 3
"""Share of a micro-batch's time that gradients may be reduced behind."""


TIME_PARTS = (
    "compute", "traffic", "accumulation", "launches", "bubble", "tp_comm", "cp_comm", "pp_comm", "dp_comm",
    "optimizer", "ema",
)  # fmt: skip
"""Parts of a step's time; none of them runs beside another."""


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """One layout: bytes by pipeline rank, seconds of a step by part, and what follows from them."""

    layout: Layout
    memory: tuple[RankMemory, ...]
    compute: float
    traffic: float
    """Norms, sums, rotations and activations between matrix products."""
    accumulation: float
    """A micro-batch's gradients added to those before it."""
    launches: float
    tp_comm: float
    cp_comm: float
    pp_comm: float
    bubble: float
    dp_comm: float
    optimizer: float
    ema: float
    tokens_per_second_per_gpu: float
    mfu: float
    volumes: dict[str, float]
    """Bytes that one rank sends in a step, by collective; the largest pipeline rank's."""

    @property
    def seconds(self) -> float:
        """Of one step."""
        return sum(getattr(self, name) for name in TIME_PARTS)

    @property
    def peak_memory(self) -> int:
        """Bytes on the fullest rank."""
        return max(m.total for m in self.memory)

    def fits(self, gpu: Gpu) -> bool:
        """Whether the fullest rank leaves the reserve free."""
        return self.peak_memory + RESERVED <= gpu.memory


def predict(config: Config, layout: Layout, setting: Setting) -> Prediction:
    """Predict `config`, to which `layout` has been applied already."""
    work = typical_work(config, setting.mix)
    num_micro_batches = config.train.global_batch_size // (layout.micro_batch * layout.dp)
    ranks = range(layout.pp)
    held = holdings(config, setting.vocab_size)
    memory = [
        rank_memory(
            config,
            setting.vocab_size,
            work,
            pp_rank=rank,
            dp_size=layout.dp,
            num_micro_batches=num_micro_batches,
        )
        for rank in ranks
    ]
    flops = step_flops(config, setting.vocab_size, work)
    stages = _stages(config, layout, setting, work, flops, held)
    tp_each, tp_bytes = _tensor_parallel(config, layout, setting, work)
    cp_each, cp_bytes = _context_parallel(config, layout, setting, work)
    pp_each, pp_bytes = _pipeline(config, layout, setting, work)
    slowest = max(stages, key=sum)
    busy = sum(slowest)
    one = busy + tp_each + cp_each + pp_each
    largest = max(held, key=lambda h: h.trainable)
    dp_seconds, dp_bytes = _data_parallel(config, layout, setting, largest, busy)
    optimizer, ema, ema_bytes = _update(config, layout, setting, largest)
    found = Prediction(
        layout=layout,
        memory=tuple(memory),
        compute=num_micro_batches * slowest[0],
        traffic=num_micro_batches * slowest[1],
        accumulation=num_micro_batches * slowest[2],
        launches=num_micro_batches * slowest[3],
        tp_comm=num_micro_batches * tp_each,
        cp_comm=num_micro_batches * cp_each,
        pp_comm=num_micro_batches * pp_each,
        bubble=(layout.pp - 1) / layout.vp * one,
        dp_comm=dp_seconds,
        optimizer=optimizer,
        ema=ema,
        tokens_per_second_per_gpu=0.0,
        mfu=0.0,
        volumes=dict(
            tensor_parallel=num_micro_batches * tp_bytes,
            context_parallel=num_micro_batches * cp_bytes,
            pipeline=num_micro_batches * pp_bytes,
            data_parallel=dp_bytes,
            teacher=ema_bytes,
        ),
    )
    replicas = num_micro_batches * layout.dp
    rate = replicas / found.seconds / setting.num_gpus
    return replace(
        found,
        tokens_per_second_per_gpu=work.dialogue_rows * rate,
        mfu=flops.total.model * rate / (setting.gpu.tflops * 1e12),
    )


def _stages(
    config: Config,
    layout: Layout,
    setting: Setting,
    work: StepWork,
    flops: StepFlops,
    held: Sequence[Held],
) -> list[tuple[float, float, float, float]]:
    """Seconds of one micro-batch on each pipeline rank: arithmetic, traffic, accumulation, launches."""
    layers = (config.model.num_layers or 0) / layout.pp
    learns = layers_learn(config, setting.vocab_size)
    student, teacher = _pass_rows(config, work)
    moved = layers * layer_bytes(config, student, teacher, learns) / setting.memory_rate
    return [
        (
            arithmetic,
            moved,
            accumulated_bytes(config, held[rank]) / setting.memory_rate,
            setting.rates.gap * kernels(config, work, layers, learns, rank == 0),
        )
        for rank, arithmetic in enumerate(_stage_seconds(config, layout, setting, work, flops))
    ]


def _stage_seconds(
    config: Config, layout: Layout, setting: Setting, work: StepWork, flops: StepFlops
) -> list[float]:
    """Seconds of one micro-batch's arithmetic on each pipeline rank: forward, backward and teacher."""
    peak = setting.rates.kernels * setting.gpu.tflops * 1e12
    matrix_rate = setting.matmul_efficiency * peak
    products = step_flops(config, setting.vocab_size, replace(work, dialogue_pairs=0, reconstruction_pairs=0))
    decoder = products.dialogue + products.reconstruction + products.teacher + products.padding
    attention = _attention_seconds(config, setting, work, flops, products)
    everywhere = (decoder.hardware / matrix_rate + attention) / layout.pp
    seconds = [everywhere] * layout.pp
    first = flops.vision.hardware + flops.targets.hardware + flops.connector.hardware
    seconds[0] += first / matrix_rate
    seconds[-1] += (flops.lm_head.hardware + flops.vision_head.hardware + flops.gram.hardware) / matrix_rate
    return [s / (layout.tp * layout.cp) for s in seconds]


def _attention_seconds(
    config: Config, setting: Setting, work: StepWork, flops: StepFlops, products: StepFlops
) -> float:
    """Seconds of all layers' attention on one GPU: what `flops` has more than `products`, at the kernels' rates."""
    model, peak = config.model, setting.rates.kernels * setting.gpu.tflops * 1e12
    assert model.num_attention_heads and model.kv_channels and model.num_layers
    student = flops.dialogue.hardware + flops.reconstruction.hardware
    student -= products.dialogue.hardware + products.reconstruction.hardware
    pairs = work.dialogue_pairs + work.reconstruction_pairs
    forward = 4.0 * pairs * model.num_attention_heads * model.kv_channels * model.num_layers
    again = forward if config.parallel.recompute_granularity and student > forward else 0.0
    backward = student - forward - again
    teacher = flops.teacher.hardware - products.teacher.hardware
    forward_rate, backward_rate = (share * peak for share in setting.gpu.attention)
    return (forward + again + teacher) / forward_rate + backward / backward_rate


def _row_bytes(config: Config) -> int:
    return (2 if config.train.bf16 else 4) * (config.model.hidden_size or 0)


def _pass_rows(config: Config, work: StepWork) -> tuple[float, float]:
    """Rows of the student's and of the teacher's pass over one micro-batch, on one context-parallel rank."""
    visual = work.visual_tokens
    student = work.dialogue_rows + work.student_padding + (visual if config.objective.reconstructs else 0)
    teacher = visual + work.teacher_padding if config.objective.teacher(config) else 0
    cp = config.parallel.context_parallel_size
    return student / cp, teacher / cp


def _tensor_parallel(config: Config, layout: Layout, setting: Setting, work: StepWork) -> tuple[float, float]:
    """(seconds, bytes sent) of one micro-batch's gathers and scatters along the sequence, on one rank."""
    student, teacher = _pass_rows(config, work)
    # Two gathers and two scatters a layer, forward and backward alike; the backward gathers the inputs of the two
    # column-parallel matrices once more for their gradients.
    times = 10 + (4 if config.parallel.recompute_granularity == "full" else 0)
    layers = (config.model.num_layers or 0) / layout.pp
    share = (layout.tp - 1) / layout.tp
    sent = layers * _row_bytes(config) * share * (times * student + 4 * teacher)
    return sent / (setting.rates.link * setting.gpu.nvlink), sent


def _context_parallel(
    config: Config, layout: Layout, setting: Setting, work: StepWork
) -> tuple[float, float]:
    """(seconds, bytes sent) of one micro-batch's exchanges of rows for heads and back, on one rank (Ulysses)."""
    if layout.cp == 1:
        return 0.0, 0.0
    model = config.model
    assert model.num_attention_heads and model.num_query_groups and model.kv_channels
    student, teacher = _pass_rows(config, work)
    # Queries in and outputs out; keys and values repeated where there are fewer of them than ranks.
    heads = 2 * model.num_attention_heads + 2 * max(model.num_query_groups, layout.tp * layout.cp)
    each = heads * model.kv_channels / layout.tp * (2 if config.train.bf16 else 4)
    times = 2 + (1 if config.parallel.recompute_granularity else 0)
    layers = (model.num_layers or 0) / layout.pp
    sent = layers * each * (layout.cp - 1) / layout.cp * (times * student + teacher)
    return sent / (setting.rates.link * setting.gpu.nvlink), sent


def _pipeline(config: Config, layout: Layout, setting: Setting, work: StepWork) -> tuple[float, float]:
    """(seconds, bytes sent) of one micro-batch's activations and their gradients between stages, on one rank."""
    if layout.pp == 1:
        return 0.0, 0.0
    travelling = config.objective.travelling() * work.visual_tokens / layout.cp
    rows = sum(_pass_rows(config, work)) + travelling
    sent = 2.0 * layout.vp * rows * _row_bytes(config) / layout.tp
    link = setting.gpu.nvlink if setting.num_gpus <= NODE else setting.gpu.network
    return sent / (setting.rates.link * link), sent


def _data_parallel_link(layout: Layout, setting: Setting) -> float:
    """Bytes per second of a collective over data-parallel ranks: those of one node share its network cards."""
    if layout.tp * layout.cp * layout.dp <= NODE:
        return setting.rates.link * setting.gpu.nvlink
    in_node = max(1, min(layout.dp * layout.cp, NODE // layout.tp))
    return setting.rates.link * min(setting.gpu.nvlink, in_node * setting.gpu.network)


def _data_parallel(
    config: Config, layout: Layout, setting: Setting, held: Held, micro_batch_seconds: float
) -> tuple[float, float]:
    """(seconds not hidden, bytes sent) of the gradients' reduction and the parameters' gather, on one rank."""
    element = 2 if config.train.bf16 else 4
    replicas = layout.dp * layout.cp
    others = (replicas - 1) / replicas
    gradients, parameters = GRADIENT * held.trainable * others, element * held.trainable * others
    link = _data_parallel_link(layout, setting)
    parallel = config.parallel
    behind_backward = BACKWARD_SHARE * micro_batch_seconds if parallel.overlap_grad_reduce else 0.0
    behind_forward = (1 - BACKWARD_SHARE) * micro_batch_seconds if parallel.overlap_param_gather else 0.0
    seconds = max(0.0, gradients / link - behind_backward) + max(0.0, parameters / link - behind_forward)
    return seconds, gradients + parameters


def _update(config: Config, layout: Layout, setting: Setting, held: Held) -> tuple[float, float, float]:
    """Seconds of the optimizer and, spread over the steps between its moves, of the teacher; and its bytes sent."""
    rate = setting.memory_rate
    replicas = layout.dp * layout.cp
    optimizer = ADAM_BYTES * held.trainable / replicas / rate
    teacher = config.objective.teacher(config)
    if teacher is None or teacher.moves_every is None or not held.averaged:
        return optimizer, 0.0, 0.0
    element = 2 if config.train.bf16 else 4
    sent = element * held.averaged * (replicas - 1) / replicas
    move = EMA_BYTES * held.averaged / replicas / rate + sent / _data_parallel_link(layout, setting)
    return optimizer, move / teacher.moves_every, sent / teacher.moves_every
