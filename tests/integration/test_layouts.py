"""One recipe, every parallel layout: the same losses, gradients and teacher; and exact resumption."""

import math

import pytest

from integration.conftest import FIRST_HALF, LAYOUTS, SECOND_HALF, VARIANT_LAYOUTS, VARIANTS
from integration.harness import read_checkpoint, read_metrics

QUANTITIES = (
    "loss",
    "lm_loss",
    "mim_loss",
    "gram_loss",
    "grad_norm",
    "teacher_distance",
    "visual_similarity",
)


def assert_same_curves(got, wanted, tolerance=1e-4):
    assert len(got) == len(wanted) > 0
    for a, b in zip(got, wanted, strict=True):
        for name in QUANTITIES:
            if b[name] is None:
                assert a[name] is None, name
            else:
                assert math.isclose(a[name], b[name], rel_tol=tolerance, abs_tol=1e-7), (name, a, b)


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "tp1"])
def test_layout_trains_like_one_process(runs, layout):
    assert_same_curves(read_metrics(runs / layout), read_metrics(runs / "tp1"))


def test_losses_are_not_trivial(runs):
    """What the layouts agree on has every part of the method in it."""
    last = read_metrics(runs / "tp1")[-1]
    assert all(last[name] > 0 for name in QUANTITIES)
    assert last["loss"] == pytest.approx(last["lm_loss"] + last["mim_loss"] + last["gram_loss"], rel=1e-6)


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "tp1"])
def test_every_parameter_gets_the_same_gradients(runs, layout):
    """Adam's first moment is linear in the gradients, so it shows one that a layout sums wrongly."""
    prefix = "optimizer.state.exp_avg."
    wanted, got = read_checkpoint(runs / "tp1", prefix), read_checkpoint(runs / layout, prefix)
    assert set(got) == set(wanted)
    assert len(wanted) > 15
    for name, reference in wanted.items():
        tensor = got[name]
        if "word_embeddings" in name:  # the padding of the vocabulary depends on the layout
            tensor, reference = tensor[:96], reference[:96]
        error = (tensor - reference).norm() / reference.norm().clamp(min=1e-12)
        assert error < 1e-3, f"{name}: {error}"


@pytest.mark.parametrize("layout", VARIANT_LAYOUTS[1:])
@pytest.mark.parametrize("variant", VARIANTS)
def test_variant_trains_alike(runs, variant, layout):
    assert_same_curves(read_metrics(runs / f"{variant}-{layout}"), read_metrics(runs / f"{variant}-tp1"))


@pytest.mark.parametrize("first", FIRST_HALF)
def test_resume_is_bitwise(runs, first):
    whole, resumed = read_metrics(runs / f"whole-{first}"), read_metrics(runs / f"resumed-{first}-{first}")
    assert [row["iteration"] for row in resumed] == [5, 6, 7, 8]
    for a, b in zip(resumed, whole[4:], strict=True):
        assert {k: a[k] for k in QUANTITIES} == {k: b[k] for k in QUANTITIES}


@pytest.mark.parametrize(("first", "second"), [(a, b) for a, bs in SECOND_HALF.items() for b in bs if a != b])
def test_resume_under_another_layout(runs, first, second):
    assert_same_curves(
        read_metrics(runs / f"resumed-{first}-{second}"), read_metrics(runs / f"whole-{first}")[4:]
    )


@pytest.mark.parametrize("layout", ["tp2", "pp2", "dp2_tp2_sp_distributed"])
def test_teacher_averages_are_the_same(runs, layout):
    wanted, got = read_checkpoint(runs / "tp1", "teacher"), read_checkpoint(runs / layout, "teacher")
    assert set(got) == set(wanted)
    for name, reference in wanted.items():
        rows = slice(None, 96) if "word_embeddings" in name else slice(None)
        error = (got[name][rows] - reference[rows]).norm() / reference[rows].norm().clamp(min=1e-12)
        assert error < 1e-4, f"{name}: {error}"
