"""What a micro-batch costs beside matrix products and attention: numbers moved, gradients added up, kernels launched.

Counted for Megatron's local layers with our norms, SwiGLU fused as on a GPU, and gradients of weights made in the
model's precision and added to fp32 sums. Widths: D model, F MLP, Q queries, K keys or values.
"""

from laver_mcore.accounting.memory import GRADIENT, Held
from laver_mcore.accounting.saved import layer_sizes
from laver_mcore.accounting.work import StepWork
from laver_mcore.config.decoders import family_named
from laver_mcore.config.schema import Config
from laver_mcore.shapes.towers import tower_shape
from laver_mcore.shapes.weights import list_weights

FORWARD_KERNELS = 12
"""Of one layer: two norms, four products, a bias, rotations, attention, SwiGLU, two residual sums."""
BACKWARD_KERNELS = 36
"""Eight products and a sum into the gradient of each weight, twice the forward's others, attention's three."""


def layers_learn(config: Config, vocab_size: int) -> bool:
    """Whether the layers have a backward pass: something in them or below them trains."""
    return any(w.trains and w.place != "last" for w in list_weights(config, vocab_size))


def forward_per_row(config: Config) -> float:
    """Numbers that one decoder layer reads and writes for each row outside its products and its attention."""
    tp, along, width, ffn, queries, keys = layer_sizes(config)
    family = family_named(config.model.family)
    # Norms read and write; residual sums read two and write one.
    everywhere = 2 * (2 + 3) * width
    heads = 2 * (queries + keys)  # rotated
    heads += 2 * (queries + 2 * keys) if family.qkv_bias else 0
    heads += 2 * (queries + keys) if family.qk_norm else 0
    return everywhere / along + (heads + 3 * ffn) / tp


def backward_per_row(config: Config) -> float:
    """The same of its backward: norms read two and write one, sums of gradients likewise, SwiGLU three and two."""
    tp, along, width, ffn, queries, keys = layer_sizes(config)
    family = family_named(config.model.family)
    everywhere = 2 * (3 + 3) * width
    heads = 2 * (queries + keys) + 2 * (queries + 2 * keys)  # rotated back, and put into one tensor
    heads += queries + 2 * keys if family.qkv_bias else 0
    heads += 3 * (queries + keys) if family.qk_norm else 0
    return everywhere / along + (heads + 5 * ffn) / tp


def layer_bytes(config: Config, student_rows: float, teacher_rows: float, learns: bool) -> float:
    """Bytes that one decoder layer moves for a micro-batch of so many rows on this rank."""
    element = 2 if config.train.bf16 else 4
    forward = forward_per_row(config)
    again = 1 if learns and config.parallel.recompute_granularity == "full" else 0
    student = (1 + again) * forward + (backward_per_row(config) if learns else 0.0)
    return element * (student * student_rows + forward * teacher_rows)


def accumulated_bytes(config: Config, held: Held) -> float:
    """Bytes of a micro-batch's gradients on their way into the fp32 sums: written and read, sums read and written."""
    element = 2 if config.train.bf16 else 4
    return (2 * element + 2 * GRADIENT) * held.trainable


def kernels(config: Config, work: StepWork, layers: float, learns: bool, first: bool) -> float:
    """Kernels that one pipeline rank launches for a micro-batch."""
    again = 1 if learns and config.parallel.recompute_granularity == "full" else 0
    each = (1 + again) * FORWARD_KERNELS + BACKWARD_KERNELS * learns
    each += FORWARD_KERNELS if config.objective.teacher(config) else 0
    tower = tower_shape(config.vision)
    towers = FORWARD_KERNELS * tower.layers if first and tower is not None and work.images else 0
    return layers * each + towers
