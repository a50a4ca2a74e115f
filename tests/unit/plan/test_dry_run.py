"""What `--dry-run` prints of a step, against parameters, bytes and FLOPs counted by hand from the model's shapes."""

from pathlib import Path

import pytest

from laver_mcore.accounting.devices import GPUS
from laver_mcore.accounting.tables import in_units, memory_table
from laver_mcore.accounting.typical import typical_mix
from laver_mcore.cli.dry_run import _step_lines
from laver_mcore.config.load import from_recipe, resolve
from laver_mcore.plan.layouts import Layout
from laver_mcore.plan.predict import predict
from laver_mcore.plan.setting import Setting

RECIPE = Path(__file__).resolve().parents[3] / "examples/qwen2.5-7b-siglip2/stage2.yaml"
GIB = 2**30
# Qwen2.5-7B: width, layers, query heads, key groups, channels of a head, inner width of the MLP, vocabulary.
D, LAYERS, H, G, C, F, V = 3584, 28, 28, 4, 128, 18944, 152064
# SigLIP2-so400m/14-384: width, layers, MLP, patches of an image; and the recipe's inner width of the vision head.
TOWER_D, TOWER_LAYERS, TOWER_F, PATCHES, HEAD = 1152, 27, 4304, 729, 2048
# A micro-batch of two rows, each with two dialogues of 1,024 tokens and one image.
ROWS, SEQUENCE, IMAGES = 2, 2048, 4
VISUAL = IMAGES * PATCHES
RECONSTRUCTION = 2944  # 2,916 visual tokens, in whole multiples of 128
SUPERVISED = ROWS * (
    SEQUENCE - 2 * PATCHES
)  # all that is no image: less than the 29 % that the mix would supervise
MICRO_BATCHES, DP = 16, 4  # 128 rows a step

QKV = (H + 2 * G) * C
LAYER_MATRICES = D * QKV + H * C * D + 3 * D * F
CONNECTOR = TOWER_D * D + D * D
VISION_HEAD = D * HEAD + HEAD * HEAD + HEAD * D


def lines_of(tp, pp, recompute):
    layout = Layout(tp=tp, pp=pp, vp=1, cp=1, dp=DP, micro_batch=ROWS, recompute=recompute)
    return _step_lines(layout.apply(resolve(from_recipe(RECIPE))), V, DP)


def decoder_flops(recompute):
    """(useful, run) FLOPs of the decoder's matrices over one micro-batch: student both ways, teacher forward.

    2 FLOPs a weight and row forward, 4 backward; full recompute repeats the student's forward.
    """
    weights, again = 2 * LAYERS * LAYER_MATRICES, recompute == "full"
    student, padding = ROWS * SEQUENCE + VISUAL, RECONSTRUCTION - VISUAL
    useful = weights * (3 * student + VISUAL)
    return useful, useful + weights * (again * student + (4 + again) * padding)


def attention_flops(recompute):
    """(useful, run forward, run backward) FLOPs of attention: 4 H C a pair forward, twice that backward.

    The backward makes the scores again, half a forward more, and full recompute repeats the student's forward.
    """
    length, n, pair = SEQUENCE // 2, PATCHES, 4 * LAYERS * H * C
    # Each dialogue: causal pairs, and every pair of the image's tokens that looks ahead.
    dialogue = IMAGES * (length * (length + 1) // 2 + n * (n - 1) // 2)
    reconstruction = IMAGES * n * n
    student, again = pair * (dialogue + reconstruction), recompute == "full"
    teacher = pair * reconstruction
    return 3 * student + teacher, (1 + again) * student + teacher, 2.5 * student


def edge_flops(tp):
    """(first stage, last stage) FLOPs beside the decoder for one micro-batch, each (useful, run)."""
    tower_layer = 4 * TOWER_D**2 + 2 * TOWER_D * TOWER_F
    tower = 2 * PATCHES * (TOWER_LAYERS * tower_layer + 3 * 14 * 14 * TOWER_D)
    tower = IMAGES * (tower + TOWER_LAYERS * 4 * TOWER_D * PATCHES**2)  # frozen: forward alone
    # Below the first matrix of the connector nothing trains: no gradient of its input.
    first = tower + VISUAL * (6 * CONNECTOR - 2 * TOWER_D * D)
    lm_head = 6 * SUPERVISED * D * V
    # The vision head is the student's and the teacher's; of the Gram loss two triangles forward, a whole product back.
    heads = (6 + 2) * VISUAL * VISION_HEAD + 4 * D * IMAGES * PATCHES**2
    # Tensor-parallel ranks do vision head and Gram loss alike.
    return (first, first), (lm_head + heads, lm_head + tp * heads)


def useful_flops(recompute=None):
    """Of one micro-batch."""
    edges = sum(useful for useful, _ in edge_flops(1))
    return decoder_flops(recompute)[0] + attention_flops(recompute)[0] + edges


@pytest.mark.parametrize("recompute", [None, "full"])
def test_flops_of_a_step(recompute):
    """To every printed digit."""
    tp = 2
    run = (
        decoder_flops(recompute)[1]
        + sum(attention_flops(recompute)[1:])
        + sum(run for _, run in edge_flops(tp))
    )
    useful, run = (MICRO_BATCHES * DP * flops / 1e15 for flops in (useful_flops(), run))
    said = f"{useful:.1f} PFLOP useful, {run:.1f} PFLOP with padding and recompute, in a step"
    assert lines_of(tp, 2, recompute)[1] == said
    assert lines_of(tp, 2, recompute)[0] == "\nfor rows of 2 images of 729 visual tokens:"


def parameters(tp, pp, stage):
    """(all, trainable, averaged by the teacher) parameters of one rank."""
    first, last = stage == 0, stage == pp - 1
    norms = 2 * D
    decoder = LAYERS // pp * ((LAYER_MATRICES + QKV) // tp + norms)
    decoder += first * (V // tp) * D  # embedding
    decoder += last * ((V // tp) * D + D)  # LM head, final norm
    vision_head = last * (VISION_HEAD + 2 * HEAD)
    connector = first * (CONNECTOR + 2 * D + D)  # biases, mask token
    tower_layer = 4 * TOWER_D**2 + 2 * TOWER_D * TOWER_F + 4 * TOWER_D + TOWER_F + TOWER_D + 4 * TOWER_D
    tower = TOWER_LAYERS * tower_layer + 3 * 14 * 14 * TOWER_D + TOWER_D + PATCHES * TOWER_D + 2 * TOWER_D
    averaged = decoder + vision_head
    return averaged + connector + first * tower, averaged + connector, averaged


def table(lines):
    """Pipeline rank -> part -> GiB."""
    header = lines[3].replace("pipeline rank", "rank").split()
    return [dict(zip(header[1:], map(float, line.split()[1:]), strict=True)) for line in lines[4:]]


@pytest.mark.parametrize(("tp", "pp"), [(1, 2), (2, 2), (4, 2)], ids=str)
def test_memory_that_stays(tp, pp):
    """bf16: 2 bytes a weight, 4 a gradient, 12 of Adam's state and 4 of the average over DP ranks, 2 of the copy.

    To every printed digit: 0.01 GiB, of which rounding takes half.
    """
    found = table(lines_of(tp, pp, "full"))
    assert len(found) == pp
    for stage, row in enumerate(found):
        held, trained, averaged = parameters(tp, pp, stage)
        wanted = dict(
            weights=2 * held,
            gradients=4 * trained,
            optimizer=12 * trained / DP,
            teacher=(4 / DP + 2) * averaged,
        )
        for part, size in wanted.items():
            assert row[part] == pytest.approx(size / GIB, abs=0.0051), (part, stage)
        parts = [value for name, value in row.items() if name != "total"]
        assert row["total"] == pytest.approx(sum(parts), abs=0.005 * (len(parts) + 1))


@pytest.mark.parametrize("tp", [1, 2])
def test_memory_of_activations(tp):
    """Under full recompute each layer keeps its input, 2 bytes a number (Korthikanti et al., arXiv 2205.05198).

    A stage holds as many micro-batches as there are stages from it to the last (1F1B). Beside the layers: the
    connector's three inputs and its inner tensor before GELU on the first stage; on the last, the final norm's two, the
    vision head's, the targets and their gradient, and what the LM head reads, gathered and not.
    """
    pp, rows = 2, ROWS * SEQUENCE + RECONSTRUCTION
    layers = LAYERS // pp * rows * D / tp
    first = pp * (layers + VISUAL * (TOWER_D + 2 * D) / tp)
    received = RECONSTRUCTION * D / tp  # the teacher's rows, which come with the student's
    last = layers + received + rows * (D / tp + D) + VISUAL * (4 * HEAD + 3 * D) + 2 * SUPERVISED * D
    for row, numbers in zip(table(lines_of(tp, pp, "full")), (first, last), strict=True):
        assert row["activations"] == pytest.approx(2 * numbers / GIB, abs=0.0051)


@pytest.mark.parametrize("tp", [1, 2])
def test_memory_of_logits(tp):
    """The last stage's alone: the micro-batch's logits in bf16, and the head's gradient twice in bf16."""
    columns = V // tp
    first, last = table(lines_of(tp, 2, "full"))
    assert first["logits"] == 0
    assert last["logits"] == pytest.approx(columns * (2 * SUPERVISED + 2 * 2 * D) / GIB, abs=0.0051)


def test_the_planner_says_the_same():
    layout = Layout(tp=2, pp=2, vp=1, cp=1, dp=DP, micro_batch=ROWS, recompute="full")
    config = layout.apply(resolve(from_recipe(RECIPE)))
    gpu = GPUS["h200"]
    setting = Setting(gpu=gpu, num_gpus=16, mix=typical_mix(config), vocab_size=V, matmul_efficiency=0.5)
    assert lines_of(2, 2, "full")[3:] == memory_table(predict(config, layout, setting).memory)


@pytest.mark.parametrize(
    ("flops", "said"),
    [
        (2.14e16, "21.4 PFLOP"),
        (1e15, "1.0 PFLOP"),
        (3.2e12, "3.2 TFLOP"),
        (6.4e8, "0.6 GFLOP"),
        (0, "0.0 GFLOP"),
    ],
)
def test_units(flops, said):
    assert in_units(flops) == said
