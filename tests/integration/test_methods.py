"""ViCToR and VIRAL in real process groups: every layout trains alike, all parts train, what is frozen stays."""

import json

import pytest
import torch
import transformers
from PIL import Image

from integration.harness import Scenario, python, read_checkpoint, read_metrics, run_scenarios
from integration.test_layouts import assert_same_tensors

LAYOUTS = {
    "tp1": (1, ""),
    "recompute": (1, "--recompute-granularity full"),
    "tp2_sp": (2, "--tensor-model-parallel-size 2 --sequence-parallel"),
    "pp2": (2, "--pipeline-model-parallel-size 2"),
    "pp2_interleaved": (
        2,
        "--pipeline-model-parallel-size 2 --num-virtual-stages-per-pipeline-rank 2 --recompute-granularity full",
    ),
    "dp2": (2, ""),
    "dp2_distributed": (2, "--use-distributed-optimizer"),
    "cp2": (2, "--context-parallel-size 2"),
}
METHODS = {
    "victor": "--objective victor --pool-size 64 --lr-mult token_pool=15",
    "viral": "--objective viral --target-path {data}/dino --target-layers 2 3 --projector-hidden-size 24",
}
TERMS = {"victor": "reconstruction_loss", "viral": "alignment_loss"}
OWN = {"victor": ("token_pool", "reconstruction_head."), "viral": ("projector.",)}
COMMON = "--train-iters 4 --adam-eps 1e-3 --weight-decay 0.1 --save-interval 1"
FROZEN = "--train-iters 20 --weight-decay 0.1 --save-interval 1 --trainable"
BF16 = {"bf16": "", "bf16_distributed": "--use-distributed-optimizer"}
OTHERS = [name for name in LAYOUTS if name != "tp1"]


def write_target(folder):
    """A tiny DINOv2 with weights, and what its processor does to an image."""
    torch.manual_seed(3)
    config = transformers.Dinov2Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, mlp_ratio=2, image_size=28, patch_size=7
    )
    transformers.Dinov2Model(config).save_pretrained(folder)
    settings = {
        "image_processor_type": "BitImageProcessor",
        "size": {"shortest_edge": 28},
        "crop_size": {"height": 28, "width": 28},
        "resample": 3,
        "rescale_factor": 1 / 255,
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
        **dict.fromkeys(("do_resize", "do_center_crop", "do_rescale", "do_normalize"), True),
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))


def table(data, directory):
    """Name -> (ranks, arguments) of every run."""
    found = {}
    for method, flags in METHODS.items():
        for layout, (ranks, layout_flags) in LAYOUTS.items():
            found[f"{method}-{layout}"] = ranks, f"{flags} {COMMON} {layout_flags}"
        own = " ".join(f"{name}*" for name in OWN[method])
        found[f"{method}-frozen"] = 1, f"{flags} {FROZEN} {own}"
        if method == "victor":
            for name, kind in BF16.items():
                found[f"victor-{name}"] = 1, f"{flags} {FROZEN} {own} --bf16 {kind}"
        again = f"{flags} {COMMON} {LAYOUTS['tp2_sp'][1]}"
        found[f"{method}-half"] = 2, f"{again} --exit-interval 2"
        if method == "viral":
            kept = flags.replace("--target-path {data}/dino", "--target-cache {data}/kept")
            found["viral-kept"] = 2, f"{kept} {COMMON} {LAYOUTS['tp2_sp'][1]} --num-workers 1"
        found[f"{method}-resumed"] = 2, f"{again} --load {directory}/{method}-half"
    base = f"--config {data / 'recipe.yaml'}"
    return {name: (ranks, f"{base} {flags.format(data=data)}") for name, (ranks, flags) in found.items()}


def needed(items):
    """Runs that the chosen tests read: those of their layout and those that they name."""
    names = set()
    for item in items:
        given = item.callspec.params if hasattr(item, "callspec") else {}
        read = [name for mark in item.iter_markers("needs_methods") for name in mark.args]
        read += [given[name] for name in ("layout",) if name in given]
        names |= {f"{given['method']}-{name}" for name in read}
    return names


@pytest.fixture(scope="module")
def target(data_directory):
    folder = data_directory / "dino"
    if not folder.is_dir():
        write_target(folder)
        viral = METHODS["viral"].format(data=data_directory).split()
        recipe = ("--config", str(data_directory / "recipe.yaml"), *viral)
        done = python("tools/prepare_targets.py", "--output", str(data_directory / "kept"), *recipe)
        assert done.returncode == 0, done.stderr[-4000:]
    return folder


@pytest.fixture(scope="module")
def runs(request, data_directory, target, tmp_path_factory):
    directory = tmp_path_factory.mktemp("methods")
    mine = [item for item in request.session.items if item.path == request.path]
    chosen, every = needed(mine), table(data_directory, directory)
    for ranks in (1, 2):
        scenarios = [
            Scenario(name=name, argv=tuple(argv.split()))
            for name, (number, argv) in every.items()
            if name in chosen and number == ranks
        ]
        if scenarios:
            run_scenarios(ranks, directory, scenarios)
    return directory


@pytest.fixture(scope="module")
def entering(data_directory, target, tmp_path_factory):
    """What entered the decoder in a step of each method."""
    directory = tmp_path_factory.mktemp("entering")
    base = f"--config {data_directory / 'recipe.yaml'}"
    commands = [f"{base} {flags.format(data=data_directory)}" for flags in METHODS.values()]
    done = python("tests/integration/methods_worker.py", str(directory), *commands)
    assert done.returncode == 0, done.stderr[-4000:]
    return directory


needs = pytest.mark.needs_methods


@needs("tp1")
@pytest.mark.parametrize("layout", OTHERS)
@pytest.mark.parametrize("method", METHODS)
def test_layout_trains_like_one_process(runs, method, layout):
    got, wanted = (read_metrics(runs / f"{method}-{name}") for name in (layout, "tp1"))
    assert len(got) == len(wanted) == 4
    for a, b in zip(got, wanted, strict=True):
        for name in ("loss", "lm_loss", TERMS[method], "grad_norm", "visual_similarity"):
            assert a[name] == pytest.approx(b[name], rel=1e-5), name


@needs("tp2_sp", "kept")
@pytest.mark.parametrize("method", ["viral"])
def test_with_kept_targets_a_run_is_the_same_up_to_their_rounding(runs, method):
    got, wanted = (read_metrics(runs / f"{method}-{name}") for name in ("kept", "tp2_sp"))
    assert len(got) == len(wanted) == 4
    for a, b in zip(got, wanted, strict=True):
        assert a["lm_loss"] == pytest.approx(b["lm_loss"], rel=1e-3)
        assert a[TERMS[method]] == pytest.approx(b[TERMS[method]], abs=2e-3)
    assert got[0]["lm_loss"] == pytest.approx(wanted[0]["lm_loss"], rel=1e-6)
    assert got[0][TERMS[method]] != wanted[0][TERMS[method]]


@needs("tp1")
@pytest.mark.parametrize("method", METHODS)
def test_the_loss_is_the_weighted_sum_and_falls(runs, method):
    rows, weight = read_metrics(runs / f"{method}-tp1"), {"victor": 10.0, "viral": 0.5}[method]
    for row in rows:
        assert row["loss"] == pytest.approx(row["lm_loss"] + weight * row[TERMS[method]], rel=1e-6)
        assert "teacher_distance" not in row
    assert rows[-1][TERMS[method]] < rows[0][TERMS[method]] - 0.01


@needs("tp1")
@pytest.mark.parametrize("iteration", [1, 3])
@pytest.mark.parametrize("layout", OTHERS)
@pytest.mark.parametrize("method", METHODS)
def test_every_parameter_gets_the_same_gradients(runs, method, layout, iteration):
    """Adam's first moment is linear in the gradients: after one step it is a tenth of the first one."""
    prefix = "optimizer.state.exp_avg."
    wanted, got = (read_checkpoint(runs / f"{method}-{n}", prefix, iteration) for n in ("tp1", layout))
    assert_same_tensors(got, wanted, 1e-4)
    for name in OWN[method]:
        mine = [tensor for key, tensor in wanted.items() if f"{prefix}{name}" in key]
        assert mine, name
        assert all(tensor.abs().sum() > 0 for tensor in mine), name


def weights_of(run, iteration):
    found = read_checkpoint(run, "", iteration)
    return {key: tensor for key, tensor in found.items() if not key.startswith(("optimizer.", "rng"))}


@needs("tp1")
@pytest.mark.parametrize("method", METHODS)
def test_all_parts_train(runs, method):
    first, last = (weights_of(runs / f"{method}-tp1", iteration) for iteration in (1, 4))
    still = [key for key in first if torch.equal(first[key], last[key])]
    assert still == []


@needs("frozen")
@pytest.mark.parametrize("method", METHODS)
def test_what_is_frozen_is_bitwise_untouched(runs, method):
    first, last = (weights_of(runs / f"{method}-frozen", iteration) for iteration in (1, 20))
    for key, tensor in first.items():
        assert torch.equal(tensor, last[key]) == (not key.startswith(OWN[method])), key
    moments = read_checkpoint(runs / f"{method}-frozen", "optimizer.state.exp_avg.", 20)
    assert all(key.removeprefix("optimizer.state.exp_avg.").startswith(OWN[method]) for key in moments)


@pytest.mark.parametrize("method", ["victor"])
@needs("frozen")
def test_rows_that_were_never_chosen_do_not_move(runs, method):
    """Neither by gradients nor by moments nor by weight decay, which reaches no row of the pool at all."""
    first, last = (
        read_checkpoint(runs / f"{method}-frozen", "token_pool", iteration)["token_pool"]
        for iteration in (1, 20)
    )
    squares = read_checkpoint(runs / f"{method}-frozen", "optimizer.state.exp_avg_sq.token_pool", 20)
    (squares,) = squares.values()
    chosen = squares.view(first.shape).abs().sum(-1) > 0
    assert 0 < chosen.sum() < len(first)
    assert torch.equal(first[~chosen], last[~chosen])
    assert not torch.equal(first[chosen], last[chosen])


@pytest.mark.parametrize("layout", ["frozen", *BF16])
@pytest.mark.parametrize("method", ["victor"])
def test_rows_that_a_step_does_not_choose_rest_in_it(runs, method, layout):
    """However often they were chosen before: Adam alone would let its moments move them on."""
    rested = 0
    for iteration in range(2, 20):
        before, after = (pool_state(runs / f"{method}-{layout}", at) for at in (iteration, iteration + 1))
        chosen = (before[2] != after[2]).any(-1)  # the second moments of rows with a gradient, in this step
        known = before[2].abs().sum(-1) > 0
        assert chosen.any()
        for a, b in zip(before, after, strict=True):
            assert torch.equal(a[~chosen], b[~chosen])
        assert layout in BF16 or (before[0] != after[0])[chosen].any(-1).all()
        rested += int((known & ~chosen).sum())
    assert rested > 0


def pool_state(run, iteration):
    """The pool with its two moments, [P, D] each."""
    pool = read_checkpoint(run, "token_pool", iteration)["token_pool"]
    names = ("optimizer.state.exp_avg.token_pool", "optimizer.state.exp_avg_sq.token_pool")
    return pool, *(
        next(iter(read_checkpoint(run, name, iteration).values())).view(pool.shape) for name in names
    )


@needs("tp2_sp", "half", "resumed")
@pytest.mark.parametrize("method", METHODS)
def test_resume_is_bitwise(runs, method):
    whole, resumed = (read_metrics(runs / f"{method}-{name}") for name in ("tp2_sp", "resumed"))
    assert [row["iteration"] for row in resumed] == [3, 4]
    for a, b in zip(resumed, whole[2:], strict=True):
        for name in ("loss", "lm_loss", TERMS[method], "grad_norm", "learning_rate"):
            assert a[name] == b[name], name


def test_visual_tokens_have_unit_length(entering):
    """In ViCToR's runs alone: a row of the decoder's input is as long as the others of its image."""
    found = json.loads((entering / "probe.json").read_text())
    assert found["victor"] == pytest.approx([1.0] * len(found["victor"]), abs=1e-6)
    assert max(abs(length - 1.0) for length in found["viral"]) > 0.01


def test_targets_of_a_run_are_the_checkpoints_patch_tokens(entering, data_directory):
    """Its own pixels, by transformers' own processor, through transformers' own model."""
    found = torch.load(entering / "targets.pt", weights_only=True)
    model = transformers.Dinov2Model.from_pretrained(data_directory / "dino").eval()
    with torch.no_grad():
        wanted = model(pixel_values=found["pixels"]).last_hidden_state[:, 1:].flatten(0, 1)
    torch.testing.assert_close(found["targets"], wanted)
    processor = transformers.BitImageProcessorPil if hasattr(transformers, "BitImageProcessorPil") else None
    processor = (processor or transformers.BitImageProcessor).from_pretrained(data_directory / "dino")
    with Image.open(data_directory / found["image"]) as picture:
        pixels = processor(picture.convert("RGB"), return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(found["pixels"][:1], pixels)


def test_what_travels_is_what_leaves_the_layers(entering):
    """Each micro-batch's rows, at the places of its visual tokens; and every layer runs once a micro-batch."""
    rows = torch.load(entering / "rows.pt", weights_only=True)
    found = torch.load(entering / "states.pt", weights_only=True)
    assert set(found["leaving"]) == {1, 2, 3, 4}
    for layer, outputs in found["leaving"].items():
        assert len(outputs) == len(rows), layer
    for layer, states in zip((2, 3), found["tapped"], strict=True):
        outputs = found["leaving"][layer]
        wanted = torch.cat([out[where] for out, where in zip(outputs, rows, strict=True)])
        assert torch.equal(states, wanted), layer
