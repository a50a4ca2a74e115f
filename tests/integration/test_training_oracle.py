"""Training against an independent step in fp64 (`tests/oracle`): losses, rates, every weight, average and the centre.

Both sides get the same numbers from this file. The engine trains in fp32, so what is left between them is rounding.
"""

import math
from dataclasses import dataclass, replace

import pytest
import torch
from oracle import laver
from oracle.decoder import Shape
from oracle.optimizer import AdamW
from sample_run import write_recipe, write_sample_data

from integration.harness import Scenario, read_checkpoint, read_metrics, run_scenarios
from laver_mcore.data.sequence.masking import draw_mask

STEPS, SPOILED, SEED, VOCABULARY = 9, 5, 1234, 96
SHAPE = Shape(num_layers=4, num_heads=4, num_groups=2, head_dim=16, rotary_base=1e4, mrope_section=(0, 4, 4))
# Clipping is active in every step. Adam divides by sqrt(v) + epsilon: where a gradient is rounding alone, a small
# epsilon would make a move of full length of it.
ADAM = AdamW(lr=2e-2, min_lr=2e-3, warmup=3, weight_decay=0.1, beta1=0.8, beta2=0.9, epsilon=1e-3, clip=0.5)
WHOLE = laver.Settings(
    shape=SHAPE,
    adam=ADAM,
    total=STEPS,
    vocab_size=VOCABULARY,
    lambda_mim=0.7,
    lambda_gram=30.0,
    mask_ratio=0.8,
    momentum=0.6,
    ema_steps=2,
    center_momentum=0.7,
    tau_student=0.5,
    tau_teacher=0.25,
)
LAYOUTS = {
    "one_process": (1, ""),
    "tp2_sp": (2, "--tensor-model-parallel-size 2 --sequence-parallel"),
    "pp2": (2, "--pipeline-model-parallel-size 2"),
    "dp2_distributed": (2, "--use-distributed-optimizer"),
}
SHORT = replace(WHOLE, total=5)
DATA = "--data-path {directory}/train.json {directory}/text_rows.json"


@dataclass(frozen=True)
class Variant:
    """A recipe that differs from the whole method, in the oracle's terms and in flags."""

    settings: laver.Settings
    flags: str
    draw: str = "permutation"


VARIANTS = {
    "released": Variant(
        replace(
            SHORT,
            clip_gram=False,
            gram_over_micro_batch=True,
            mixed=False,
            two_dimensional=False,
            lambda_gram=1.0,
        ),
        f"{DATA} --gram ga --gram-scope micro_batch --mask-draw bernoulli --no-mixed-attention --no-rope-2d",
        "bernoulli",
    ),
    "contiguous_bands": Variant(
        replace(SHORT, shape=replace(SHAPE, mrope_split="contiguous")), f"{DATA} --mrope-split contiguous"
    ),
    "lm_only": Variant(replace(SHORT, laver=False), f"{DATA} --objective lm"),
    "one_token": Variant(SHORT, f"{DATA} --image-size 8 --patch-size 8"),
    "text_rows": Variant(SHORT, "--data-path {directory}/text_rows.json"),
    "untied_two_rows": Variant(
        SHORT, f"{DATA} --untie-embeddings-and-output-weights True --micro-batch-size 2"
    ),
    "frozen_decoder": Variant(
        replace(SHORT, trainable=("connector.*", "mask_token", "vision_head.*")),
        f"{DATA} --trainable connector.* mask_token vision_head.*",
    ),
    "connector_only": Variant(
        replace(SHORT, laver=False, trainable=("connector.*",)),
        f"{DATA} --objective lm --trainable connector.*",
    ),
}

# Largest differences over all steps. fp32 rounds at 6e-8; clipping has scaled gradients down up to a hundredfold, and
# errors of nine steps add up in weights, which are measured against the way they have come (1e-2 of their size). The
# clipped Gram loss has a kink at every pair as alike as the teacher's, so its gradient is the least exact. Measured:
# at most 1.3e-5, 1.2e-4 for the gradient norm, 2.5e-5 for weights.
TOLERANCE = {
    "losses": 1e-4,
    "grad_norm": 5e-4,
    "learning_rate": 1e-12,
    "weights": 1e-4,
    "averages": 1e-4,
    "center": 1e-4,
}


def flags(settings: laver.Settings) -> str:
    """The recipe of these settings on the command line."""
    adam = settings.adam
    common = (
        f"--train-iters {settings.total} --save-interval 1 --seed {SEED} "
        f"--lr {adam.lr} --min-lr {adam.min_lr} --lr-warmup-iters {adam.warmup} --weight-decay {adam.weight_decay} "
        f"--adam-beta1 {adam.beta1} --adam-beta2 {adam.beta2} --adam-eps {adam.epsilon} --clip-grad {adam.clip} "
    )
    if not settings.laver:
        return common
    return common + (
        "--mask-strategy cosine --centering "
        f"--lambda-laver {settings.lambda_mim} --lambda-gram {settings.lambda_gram} "
        f"--mask-ratio {settings.mask_ratio} --momentum {settings.momentum} --ema-steps {settings.ema_steps} "
        f"--center-momentum {settings.center_momentum} --student-temperature {settings.tau_student} "
        f"--teacher-temperature {settings.tau_teacher} "
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    directory = tmp_path_factory.mktemp("oracle")
    write_sample_data(directory)
    write_recipe(directory)
    return directory


def scenario(folder, name: str, settings: laver.Settings, extra: str, **options) -> Scenario:
    argv = f"--config {folder}/recipe.yaml {flags(settings)} {extra}".format(directory=folder)
    return Scenario(name=name, argv=tuple(argv.split()), **options)


def launch_recorded(folder, variants: dict[str, Variant], spoiled: int | None):
    """Each of these recipes in one process, recorded: its starting weights and its batches."""
    scenarios = [
        scenario(folder, name, variant.settings, variant.flags, spoiled=spoiled, record=True)
        for name, variant in variants.items()
    ]
    run_scenarios(1, folder, scenarios)
    return folder


@pytest.fixture(scope="module")
def one_process(folder):
    return launch_recorded(folder, {"one_process": Variant(WHOLE, DATA)}, SPOILED)


def asked_for(request, parameter: str) -> set[str]:
    """The values of a test parameter in this session: only their runs are trained."""
    calls = [item.callspec.params for item in request.session.items if hasattr(item, "callspec")]
    return {params[parameter] for params in calls if parameter in params}


@pytest.fixture(scope="module")
def variants(folder, request):
    wanted = asked_for(request, "variant")
    return launch_recorded(folder, {name: VARIANTS[name] for name in VARIANTS if name in wanted}, None)


@pytest.fixture(scope="module")
def two_ranks(folder, request):
    wanted = asked_for(request, "layout")
    scenarios = [
        scenario(folder, name, WHOLE, f"{DATA} {extra}", spoiled=SPOILED)
        for name, (ranks, extra) in LAYOUTS.items()
        if ranks == 2 and name in wanted
    ]
    run_scenarios(2, folder, scenarios)
    return folder


def micro_batches(folder, name: str) -> list[list[laver.MicroBatch]]:
    """What every step was given, as the oracle takes it."""
    return [
        [
            laver.MicroBatch(
                tokens=given["tokens_T"],
                labels=given["labels_T"],
                document_lengths=given["document_lengths"],
                visual_rows=given["visual_rows_N"].tolist(),
                image_grids=given["image_grids"],
                image_keys=given["image_keys"],
                pixels=given["pixels"],
            )
            for given in step
        ]
        for step in torch.load(folder / name / "batches.pt")
    ]


def model_weights(run, iteration: int) -> dict[str, torch.Tensor]:
    return {
        name: tensor
        for name, tensor in read_checkpoint(run, "", iteration).items()
        if not name.startswith(("teacher", "optimizer."))
    }


def follow(folder, name: str, variant: Variant, spoiled: int | None):
    """The oracle's course: what it logs and a copy of its state after every step."""
    settings = variant.settings

    def draw(num_tokens, ratio, key, image, iteration):
        return draw_mask(
            num_tokens, ratio, strategy=variant.draw, seed=SEED, key=key, step=iteration, image_index=image
        )

    state = laver.start(model_weights(folder / name / "start", 0), settings)
    beginning, course = state.weights.copy(), []
    for iteration, batches in enumerate(micro_batches(folder, name)):
        if iteration == spoiled:
            batches = [replace(batch, pixels=batch.pixels * math.inf) for batch in batches]
        row = laver.train_step(state, batches, iteration, settings, draw)
        course.append((row, replace(state, weights=state.weights.copy(), averages=state.averages.copy())))
    return beginning, course


@pytest.fixture(scope="module")
def whole_course(one_process):
    return follow(one_process, "one_process", Variant(WHOLE, DATA), SPOILED)


def relative(got: float, wanted: float) -> float:
    return abs(got - wanted) / max(abs(wanted), 1e-6)


def apart(got: dict, wanted: dict, beginning: dict) -> float:
    """Largest difference of any tensor, relative to how far the oracle's has come, or to its size where it stands.

    A tensor in fp32 is 2^-24 of its size off at best, and a sum of two of them 2^-23: that much is not counted.
    """
    worst = 0.0
    for name, goal in wanted.items():
        rows = (
            slice(VOCABULARY)
            if name.endswith(("word_embeddings.weight", "output_layer.weight"))
            else slice(None)
        )
        come = (goal[rows] - beginning[name][rows]).norm()
        scale = come if come > 1e-6 else goal[rows].norm().clamp(min=1.0)
        difference = (got[name].double()[rows] - goal[rows]).norm() - 2**-23 * goal[rows].norm()
        worst = max(worst, (difference.clamp(min=0) / scale).item())
    return worst


def compare(run, beginning, course, spoiled: int | None) -> dict[str, float]:
    """Largest differences over all steps, by kind."""
    worst = dict.fromkeys(TOLERANCE, 0.0)
    logged = read_metrics(run)
    assert len(logged) == len(course)
    for iteration, (got, (wanted, state)) in enumerate(zip(logged, course, strict=True)):
        assert got["skipped"] == state.skipped == (spoiled is not None and iteration >= spoiled)
        for name in ("loss", "lm_loss", "mim_loss", "gram_loss", "visual_similarity"):
            if name in wanted and got.get(name) is not None:
                worst["losses"] = max(worst["losses"], relative(got[name], wanted[name]))
        if got.get("teacher_distance") is not None:
            worst["losses"] = max(worst["losses"], relative(got["teacher_distance"], state.distance))
        if iteration == spoiled:
            assert got["grad_norm"] is None and not math.isfinite(wanted["grad_norm"])
        else:
            worst["grad_norm"] = max(worst["grad_norm"], relative(got["grad_norm"], wanted["grad_norm"]))
        worst["learning_rate"] = max(
            worst["learning_rate"], relative(got["learning_rate"], wanted["learning_rate"])
        )
        stored = read_checkpoint(run, "", iteration + 1)
        worst["weights"] = max(worst["weights"], apart(stored, state.weights, beginning))
        averages = {
            name.removeprefix("teacher."): t for name, t in stored.items() if name.startswith("teacher.")
        }
        assert set(averages) == set(state.averages)
        worst["averages"] = max(worst["averages"], apart(averages, state.averages, beginning))
        if averages:
            nothing = torch.zeros_like(state.center)
            distance = apart({"c": stored["teacher_center"]}, {"c": state.center}, {"c": nothing})
            worst["center"] = max(worst["center"], distance)
    return worst


def check(name: str, worst: dict[str, float]) -> None:
    print(f"{name:<16}" + "  ".join(f"{kind} {value:.1e}" for kind, value in worst.items()))
    assert {kind: value for kind, value in worst.items() if value > TOLERANCE[kind]} == {}


def test_the_course_holds_every_case(one_process, whole_course):
    """Several images in a sample, a row of text alone, active clipping, masked and unmasked steps, a skipped one."""
    steps = micro_batches(one_process, "one_process")
    batches = [batch for step in steps for batch in step]
    assert any(index > 0 for batch in batches for _, index in batch.image_keys)
    assert any(not batch.image_grids for batch in batches)
    assert any(len(batch.document_lengths) > 1 for batch in batches)
    rows = [row for row, _ in whole_course[1]]
    assert all(row["grad_norm"] > 2 * ADAM.clip for i, row in enumerate(rows) if i != SPOILED)
    assert rows[0]["mim_loss"] == 0
    assert sum(row.get("mim_loss", 0) > 0 for row in rows) >= 4
    assert sum(WHOLE.lambda_gram * row.get("gram_loss", 0) > 1e-2 for row in rows) >= 3
    assert rows[-1]["loss"] != pytest.approx(rows[-1]["lm_loss"], rel=0.1)
    assert (SPOILED + 1) % WHOLE.ema_steps == 0, "the teacher would have moved in the skipped step"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_follows_the_oracle(whole_course, request, layout):
    directory = request.getfixturevalue("one_process" if LAYOUTS[layout][0] == 1 else "two_ranks")
    check(layout, compare(directory / layout, *whole_course, SPOILED))


@pytest.mark.parametrize("variant", VARIANTS)
def test_variant_follows_the_oracle(variants, variant):
    check(variant, compare(variants / variant, *follow(variants, variant, VARIANTS[variant], None), None))


@pytest.mark.parametrize("variant", ["connector_only"])
def test_last_stage_where_nothing_trains_follows_the_oracle(variants, variant):
    """Its rank writes the metrics, and reads the learning rate from groups that hold none of its parameters."""
    name, settings = f"{variant}-pp2", VARIANTS[variant].settings
    extra = f"{VARIANTS[variant].flags} {LAYOUTS['pp2'][1]}"
    run_scenarios(2, variants, [scenario(variants, name, settings, extra)])
    check(name, compare(variants / name, *follow(variants, variant, VARIANTS[variant], None), None))
