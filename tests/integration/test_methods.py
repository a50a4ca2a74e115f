"""ViCToR and VIRAL in real process groups: every layout trains alike, all parts train, what is frozen stays."""

import json

import pytest
import torch
import transformers

from integration.harness import Scenario, read_checkpoint, read_metrics, run_scenarios
from integration.test_layouts import assert_same_tensors

LAYOUTS = {
    "tp1": (1, ""),
    "recompute": (1, "--recompute-granularity full"),
    "tp2": (2, "--tensor-model-parallel-size 2"),
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
COMMON = "--train-iters 6 --adam-eps 1e-3 --weight-decay 0.1 --save-interval 1"
FROZEN = "--train-iters 20 --weight-decay 0.1 --save-interval 1 --trainable"
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


@pytest.fixture(scope="module")
def runs(data_directory, tmp_path_factory):
    directory = tmp_path_factory.mktemp("methods")
    write_target(data_directory / "dino")
    scenarios = {1: [], 2: []}

    def add(name, ranks, flags):
        argv = ["--config", str(data_directory / "recipe.yaml"), *flags.format(data=data_directory).split()]
        scenarios[ranks].append(Scenario(name=name, argv=tuple(argv)))

    for method, flags in METHODS.items():
        for layout, (ranks, layout_flags) in LAYOUTS.items():
            add(f"{method}-{layout}", ranks, f"{flags} {COMMON} {layout_flags}")
        own = " ".join(f"{name}*" for name in OWN[method])
        add(f"{method}-frozen", 1, f"{flags} {FROZEN} {own}")
        add(f"{method}-half", 2, f"{flags} {COMMON} {LAYOUTS['tp2_sp'][1]} --exit-interval 3")
        resumed = f"{flags} {COMMON} {LAYOUTS['tp2_sp'][1]} --load {directory}/{method}-half"
        add(f"{method}-resumed", 2, resumed)
    for ranks, chosen in scenarios.items():
        run_scenarios(ranks, directory, chosen)
    return directory


@pytest.mark.parametrize("layout", OTHERS)
@pytest.mark.parametrize("method", METHODS)
def test_layout_trains_like_one_process(runs, method, layout):
    got, wanted = (read_metrics(runs / f"{method}-{name}") for name in (layout, "tp1"))
    assert len(got) == len(wanted) == 6
    for a, b in zip(got, wanted, strict=True):
        for name in ("loss", "lm_loss", TERMS[method], "grad_norm", "visual_similarity"):
            assert a[name] == pytest.approx(b[name], rel=1e-5), name


@pytest.mark.parametrize("method", METHODS)
def test_the_loss_is_the_weighted_sum_and_falls(runs, method):
    rows, weight = read_metrics(runs / f"{method}-tp1"), {"victor": 10.0, "viral": 0.5}[method]
    for row in rows:
        assert row["loss"] == pytest.approx(row["lm_loss"] + weight * row[TERMS[method]], rel=1e-6)
        assert "teacher_distance" not in row
    assert rows[-1][TERMS[method]] < rows[0][TERMS[method]] - 0.01


@pytest.mark.parametrize("iteration", [1, 5])
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


@pytest.mark.parametrize("method", METHODS)
def test_all_parts_train(runs, method):
    first, last = (weights_of(runs / f"{method}-tp1", iteration) for iteration in (1, 6))
    still = [key for key in first if torch.equal(first[key], last[key])]
    assert still == []


@pytest.mark.parametrize("method", METHODS)
def test_what_is_frozen_is_bitwise_untouched(runs, method):
    first, last = (weights_of(runs / f"{method}-frozen", iteration) for iteration in (1, 20))
    for key, tensor in first.items():
        assert torch.equal(tensor, last[key]) == (not key.startswith(OWN[method])), key
    moments = read_checkpoint(runs / f"{method}-frozen", "optimizer.state.exp_avg.", 20)
    assert all(key.removeprefix("optimizer.state.exp_avg.").startswith(OWN[method]) for key in moments)


def test_rows_that_were_never_chosen_do_not_move(runs):
    """Neither by gradients nor by moments nor by weight decay, which reaches no row of the pool at all."""
    first, last = (
        read_checkpoint(runs / "victor-frozen", "token_pool", iteration)["token_pool"]
        for iteration in (1, 20)
    )
    squares = read_checkpoint(runs / "victor-frozen", "optimizer.state.exp_avg_sq.token_pool", 20)
    (squares,) = squares.values()
    chosen = squares.view(first.shape).abs().sum(-1) > 0
    assert 0 < chosen.sum() < len(first)
    assert torch.equal(first[~chosen], last[~chosen])
    assert not torch.equal(first[chosen], last[chosen])


@pytest.mark.parametrize("method", METHODS)
def test_resume_is_bitwise(runs, method):
    whole, resumed = (read_metrics(runs / f"{method}-{name}") for name in ("tp2_sp", "resumed"))
    assert [row["iteration"] for row in resumed] == [4, 5, 6]
    for a, b in zip(resumed, whole[3:], strict=True):
        for name in ("loss", "lm_loss", TERMS[method], "grad_norm", "learning_rate"):
            assert a[name] == b[name], name
