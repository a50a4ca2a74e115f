"""Floating-point operations of one step by part: useful ones (model, for MFU) and those that run (hardware, for HFU).

Model FLOPs are the matrix products that the method needs: 2 m n k forward, as much again for a weight that trains and
for an input that something below has to learn from; attention 4 x pairs x heads x channels forward and twice that
backward; the Gram matrices' upper triangles. Hardware FLOPs add padding, what recompute repeats, the scores that
attention's backward computes again (2.5 instead of 2 forwards), and what tensor- and context-parallel ranks do alike.
Norms, activations, rotations and softmax are not counted.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from laver_mcore.accounting.work import StepWork
from laver_mcore.config.schema import Config
from laver_mcore.config.towers.spec import TowerShape
from laver_mcore.shapes.frozen import window_pairs
from laver_mcore.shapes.towers import tower_shape
from laver_mcore.shapes.weights import EMBEDDING, HEAD, Weight, frozen_tower, list_weights, target_tower

ATTENTION_BACKWARD = 2.0
"""Backward of attention in forwards: four products for two."""
ATTENTION_BACKWARD_HARDWARE = 2.5
"""The same with the scores computed again (FlashAttention-2, arXiv 2307.08691)."""
ADAM_BYTES = 30
"""Bytes that Adam moves per trained parameter: fp32 gradient in, master and two moments in and out, bf16 weight out."""
EMA_BYTES = 14
"""Bytes that one move of the teacher touches per parameter: master read, average read and written, bf16 copy out."""


@dataclass(frozen=True, kw_only=True)
class Flops:
    """FLOPs over all ranks; what is not useful is in `hardware` alone."""

    model: float = 0.0
    hardware: float = 0.0

    def __add__(self, other: "Flops") -> "Flops":
        return Flops(model=self.model + other.model, hardware=self.hardware + other.hardware)


@dataclass(frozen=True, kw_only=True)
class StepFlops:
    """FLOPs of one step over all ranks, by part. Optimizer and teacher update are a matter of bytes, not FLOPs."""

    vision: Flops
    targets: Flops
    """A frozen encoder that gives an objective its targets."""
    connector: Flops
    dialogue: Flops
    reconstruction: Flops
    teacher: Flops
    lm_head: Flops
    vision_head: Flops
    gram: Flops
    padding: Flops
    optimizer_bytes: int
    """Bytes that Adam moves in a step, counting every parameter once."""
    ema_bytes: int
    """Bytes that the averages move in a step in which the teacher moves."""

    @property
    def parts(self) -> dict[str, Flops]:
        """Name -> FLOPs, in the order of the step."""
        return {name: getattr(self, name) for name in PARTS}

    @property
    def total(self) -> Flops:
        """Sum over all parts."""
        return sum(self.parts.values(), Flops())


PARTS = (
    "vision", "targets", "connector", "teacher", "dialogue", "reconstruction", "lm_head", "vision_head", "gram",
    "padding",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class _PerRow:
    """FLOPs of a chain of matrices for one row (of attention: for one pair)."""

    forward: float = 0.0
    backward: float = 0.0
    repeated: float = 0.0
    """Forward that the backward runs again (recompute)."""

    @property
    def model(self) -> float:
        return self.forward + self.backward


def step_flops(config: Config, vocab_size: int, work: StepWork) -> StepFlops:
    """FLOPs of a step that contains `work`; `vocab_size` is the one before padding.

    Only what `train.trainable` needs is counted: no weight gradients of frozen weights, no input gradients below the
    lowest weight that trains.
    """
    weights = list_weights(config, vocab_size)
    learning = _with_what_learns_below(weights)
    decoder, attention = _decoder(config, learning)
    head = _matrices(w for w in learning if w[0].rows == "latent")
    connector = _matrices(w for w in learning if w[0].name.startswith("connector."))
    vision = _vision(tower_shape(config.vision), learning, work)
    visual, pairs = work.visual_tokens, work.reconstruction_pairs
    # Vision head and Gram loss run on all visual tokens on every tensor- and context-parallel rank.
    alike = config.parallel.tensor_model_parallel_size * config.parallel.context_parallel_size
    teacher = decoder.forward * visual + attention.forward * pairs
    heads = head.forward * visual
    # Upper triangles of student and teacher; the gradient is one whole product.
    gram = (
        work.gram_pairs * (config.model.hidden_size or 0) * (4.0 if any(w.trains for w in weights) else 2.0)
    )
    again, taught = config.objective.reconstructs, config.objective.teacher(config) is not None
    return StepFlops(
        vision=Flops(model=vision.model, hardware=vision.model + vision.repeated),
        targets=_targets(config, work),
        connector=Flops(model=connector.model * visual, hardware=connector.model * visual),
        teacher=Flops(model=teacher + heads, hardware=teacher + alike * heads) if taught else Flops(),
        dialogue=_rows(decoder, work.dialogue_rows) + _pairs(attention, work.dialogue_pairs),
        reconstruction=_rows(decoder, visual) + _pairs(attention, pairs) if again else Flops(),
        lm_head=_lm_head(config, vocab_size, learning, work.supervised_rows),
        vision_head=Flops(model=head.model * visual, hardware=alike * head.model * visual),
        gram=Flops(model=gram, hardware=alike * gram),
        padding=Flops(
            hardware=_rows(decoder, work.student_padding).hardware + decoder.forward * work.teacher_padding
        ),
        optimizer_bytes=ADAM_BYTES * sum(w.size for w in weights if w.trains),
        ema_bytes=EMA_BYTES * sum(w.size for w in weights if w.averaged),
    )


_Learning = tuple[Weight, bool]
"""A weight, and whether anything below it trains, so that its input needs a gradient."""


def _with_what_learns_below(weights: Sequence[Weight]) -> list[_Learning]:
    found, below = [], False
    for weight in weights:
        found.append((weight, below))
        below = below or (
            weight.trains and weight.name != HEAD
        )  # the vision head stands beside it, not above
    return found


def _matrices(weights: Iterable[_Learning]) -> _PerRow:
    found = [(2.0 * w.size * w.uses, w.trains + below) for w, below in weights if w.rows]
    return _PerRow(
        forward=sum(flops for flops, _ in found), backward=sum(flops * times for flops, times in found)
    )


def _rows(chain: _PerRow, rows: int) -> Flops:
    return Flops(model=chain.model * rows, hardware=(chain.model + chain.repeated) * rows)


def _pairs(attention: _PerRow, pairs: int) -> Flops:
    extra = attention.backward * (ATTENTION_BACKWARD_HARDWARE / ATTENTION_BACKWARD - 1.0) + attention.repeated
    return Flops(model=attention.model * pairs, hardware=(attention.model + extra) * pairs)


def _decoder(config: Config, learning: Sequence[_Learning]) -> tuple[_PerRow, _PerRow]:
    """(per row, per attention pair) of all decoder layers."""
    model, granularity = config.model, config.parallel.recompute_granularity
    assert model.num_attention_heads and model.kv_channels and model.num_layers
    pair = 4.0 * model.num_attention_heads * model.kv_channels
    rows, attention = [], []
    recomputed = _recomputed_layers(config)
    layers: list[list[_Learning]] = [[] for _ in range(model.num_layers)]
    for item in learning:
        if item[0].place == "layer":
            layers[item[0].layer].append(item)
    for number, layer in enumerate(layers):
        one = _matrices(layer)
        again = number in recomputed and one.backward > 0
        learns = any(below or w.trains for w, below in layer if w.name.endswith("linear_qkv.weight"))
        rows.append(_PerRow(forward=one.forward, backward=one.backward, repeated=one.forward * again))
        attention.append(
            _PerRow(
                forward=pair,
                backward=pair * ATTENTION_BACKWARD * learns,
                repeated=pair * (again or (learns and granularity == "selective")),
            )
        )
    return _sum(rows), _sum(attention)


def _sum(parts: Sequence[_PerRow]) -> _PerRow:
    return _PerRow(
        forward=sum(p.forward for p in parts),
        backward=sum(p.backward for p in parts),
        repeated=sum(p.repeated for p in parts),
    )


def _recomputed_layers(config: Config) -> set[int]:
    """Decoder layers that full recompute runs again: all, or the first ones of every pipeline chunk."""
    parallel, num_layers = config.parallel, config.model.num_layers or 0
    if parallel.recompute_granularity != "full":
        return set()
    if parallel.recompute_method != "block":
        return set(range(num_layers))
    chunks = parallel.pipeline_model_parallel_size * (parallel.num_virtual_stages_per_pipeline_rank or 1)
    each, first = num_layers // chunks, parallel.recompute_num_layers or 1
    return {layer for layer in range(num_layers) if layer % each < first}


def _lm_head(config: Config, vocab_size: int, learning: Sequence[_Learning], rows: int) -> Flops:
    name = HEAD if config.model.untie_embeddings_and_output_weights else EMBEDDING
    ((weight, _),) = (item for item in learning if item[0].name == name)
    below = any(
        w.trains for w, _ in learning if w.place != "last" or w.name.endswith("final_layernorm.weight")
    )
    padded, width = weight.shape
    one = 2.0 * rows * width * (1 + weight.trains + below)
    return Flops(model=one * vocab_size, hardware=one * padded)


def _targets(config: Config, work: StepWork) -> Flops:
    """One forward of the objective's frozen encoder over all images, at its own resolution."""
    tower = target_tower(config)
    if tower is None:
        return Flops()
    assert tower.fixed_tokens is not None
    tokens = tower.fixed_tokens + tower.prefix_tokens
    seen = StepWork(
        images=work.images,
        patches=work.images * tokens,
        patch_pairs=work.images * tokens**2,
        window_pairs=work.images * window_pairs(tower),
    )
    forward = _vision(tower, [(weight, False) for weight in frozen_tower(tower)], seen).forward
    return Flops(model=forward, hardware=forward)


def _vision(tower: TowerShape | None, learning: Sequence[_Learning], work: StepWork) -> _PerRow:
    """FLOPs of the tower over the whole step, not per row."""
    if tower is None or not work.images:
        return _PerRow()
    mine = [item for item in learning if item[0].name.startswith("vision_encoder.")]
    patches = _matrices(item for item in mine if item[0].rows == "patches")
    visual = _matrices(item for item in mine if item[0].rows == "visual")
    # CLS tokens are not projected from pixels.
    (projection, _) = next(item for item in mine if item[0].rows == "patches")
    cls = 2.0 * projection.size * work.images * tower.prefix_tokens
    full = tower.full_layers if tower.window else tower.layers
    pairs = full * work.patch_pairs + (tower.layers - full) * work.window_pairs
    attention = 4.0 * tower.width * pairs
    learns = sum(w.trains or below for w, below in mine if w.name.endswith(("qkv.weight", "q_proj.weight")))
    share = ATTENTION_BACKWARD * learns / tower.layers
    return _PerRow(
        forward=patches.forward * work.patches + visual.forward * work.visual_tokens + attention - cls,
        backward=patches.backward * work.patches
        + visual.backward * work.visual_tokens
        + attention * share
        - cls * projection.trains,
        repeated=attention * share * (ATTENTION_BACKWARD_HARDWARE / ATTENTION_BACKWARD - 1.0),
    )
