"""The teacher's forward in fp8: its targets under every layout, and the student that never notices."""

import json

import pytest
import torch

from integration.harness import Scenario, python, read_metrics, run_scenarios, torchrun

# Name -> (ranks, flags).
STEPS = {
    "same": (1, ""),
    "fp8": (1, "--teacher-precision fp8"),
    "recompute": (1, "--teacher-precision fp8 --recompute-granularity full"),
    "bf16": (1, "--bf16"),
    "fp8_bf16": (1, "--bf16 --teacher-precision fp8"),
    "tp2": (2, "--teacher-precision fp8 --tensor-model-parallel-size 2"),
    "tp2_sp": (2, "--teacher-precision fp8 --tensor-model-parallel-size 2 --sequence-parallel"),
    "pp2": (2, "--teacher-precision fp8 --pipeline-model-parallel-size 2"),
    "cp2": (2, "--teacher-precision fp8 --context-parallel-size 2"),
}
LARGE_WEIGHTS = "--init-method-std 0.1"
"""Otherwise four random layers add next to nothing to what goes through them."""
FP8 = [name for name, (_, flags) in STEPS.items() if "fp8" in flags and "bf16" not in flags and name != "fp8"]
WITHOUT_TARGETS = "--lambda-laver 0 --lambda-gram 0"
RUNS = {
    "unmoved": WITHOUT_TARGETS,
    "unmoved_fp8": f"{WITHOUT_TARGETS} --teacher-precision fp8",
    "trained": "",
    "trained_fp8": "--teacher-precision fp8 --use-distributed-optimizer",
    "slow": "--lr 1e-5",
    "slow_fp8": "--lr 1e-5 --teacher-precision fp8 --use-distributed-optimizer",
}


@pytest.fixture(scope="module")
def outputs(data_directory, tmp_path_factory):
    """What each scenario's first step put out."""
    directory = tmp_path_factory.mktemp("targets")
    for ranks in (1, 2):
        plan = [
            {"name": name, "argv": f"--config {data_directory}/recipe.yaml {LARGE_WEIGHTS} {flags}".split()}
            for name, (needed, flags) in STEPS.items()
            if needed == ranks
        ]
        (directory / "plan.json").write_text(json.dumps(plan))
        done = torchrun(ranks, "tests/integration/targets_worker.py", str(directory / "plan.json"))
        assert done.returncode == 0, done.stderr[-6000:]
    return {name: torch.load(directory / f"{name}.pt") for name in STEPS}


@pytest.fixture(scope="module")
def runs(data_directory, tmp_path_factory):
    directory = tmp_path_factory.mktemp("fp8_runs")
    base = ("--config", str(data_directory / "recipe.yaml"), "--train-iters", "5")
    run_scenarios(
        1, directory, [Scenario(name=name, argv=(*base, *flags.split())) for name, flags in RUNS.items()]
    )
    return {name: read_metrics(directory / name) for name in RUNS}


def apart(got, wanted):
    """Relative error of every row."""
    return (got.double() - wanted.double()).norm(dim=-1) / wanted.double().norm(dim=-1)


def test_targets_are_those_of_fp8(outputs):
    """Different, by what four layers of three-bit mantissas make; the student's are the same bit by bit."""
    error = apart(outputs["fp8"]["teacher"], outputs["same"]["teacher"])
    assert 1e-3 < error.mean() < 0.1
    assert torch.equal(outputs["fp8"]["student"], outputs["same"]["student"])


def test_student_in_bf16_is_the_same_bit_by_bit(outputs):
    assert torch.equal(outputs["fp8_bf16"]["student"], outputs["bf16"]["student"])
    assert not torch.equal(outputs["fp8_bf16"]["teacher"], outputs["bf16"]["teacher"])


@pytest.mark.parametrize("name", FP8)
def test_targets_are_the_same_under_every_layout(outputs, name):
    """Codes agree, but where an activation that differs in its last bit lies between two of them: few rows, and far
    less than fp8 itself changes."""
    error = apart(outputs[name]["teacher"], outputs["fp8"]["teacher"])
    itself = apart(outputs["fp8"]["teacher"], outputs["same"]["teacher"])
    assert error.median() < 1e-5
    assert error.mean() < itself.mean() / 20
    assert outputs[name]["losses"] == pytest.approx(outputs["fp8"]["losses"], rel=1e-3)


def test_training_without_targets_is_the_same_bit_by_bit(runs):
    """Gradients, weights and the teacher's moves: nothing but the losses against the targets differs."""
    for got, wanted in zip(runs["unmoved_fp8"], runs["unmoved"], strict=True):
        for name in ("lm_loss", "grad_norm", "teacher_distance", "visual_similarity"):
            assert got[name] == wanted[name], name
    assert all(runs["unmoved_fp8"][i]["mim_loss"] != runs["unmoved"][i]["mim_loss"] > 0 for i in range(1, 5))


# Run -> relative differences allowed up to the first masked step, the second, and after it. With the recipe's small
# weights fp8 changes targets by a few 1e-4 (with large ones by 1e-2, see above), and the losses with them; the LM loss
# only through the weights. Adam moves a weight by about the learning rate, whichever way a gradient near zero points:
# two runs part by up to 2 lr a step. At 1e-5 that is 0.1 % of the weights' standard deviation of 0.02, and nothing to
# see; at the recipe's 1e-3 it is 10 %.
CLOSE = {
    "slow": (
        dict(mim_loss=2e-3, gram_loss=2e-3, lm_loss=1e-5),
        dict(mim_loss=2e-3, gram_loss=2e-3, lm_loss=1e-5),
    ),
    "trained": (
        dict(mim_loss=2e-3, gram_loss=1e-2, lm_loss=1e-5),
        dict(mim_loss=0.1, gram_loss=0.1, lm_loss=1e-3),
    ),
}


@pytest.mark.parametrize("name", CLOSE)
def test_training_goes_on_alike(runs, name):
    assert len(runs[f"{name}_fp8"]) == 5
    for got, wanted in zip(runs[f"{name}_fp8"], runs[name], strict=True):
        for loss, close in CLOSE[name][got["iteration"] > 2].items():
            # Before anything is masked the student sees what the teacher sees: no Gram loss, but fp8's.
            assert got[loss] == pytest.approx(wanted[loss], rel=close, abs=1e-6), (loss, got["iteration"])
    assert runs[f"{name}_fp8"][-1]["mim_loss"] != runs[name][-1]["mim_loss"]


def test_the_tool_measures_it(data_directory):
    command = ["tools/measure_teacher_precision.py", "--config", str(data_directory / "recipe.yaml")]
    done = python(*command, "--micro-batches", "2", *LARGE_WEIGHTS.split())
    assert done.returncode == 0, done.stderr[-4000:]
    rows = {
        line[:14].strip(): [float(x) for x in line[14:].split()] for line in done.stdout.splitlines()[2:5]
    }
    assert set(rows) == {"bf16 / fp32", "fp8 / fp32", "fp8 / bf16"}
    error, cosine, divergence, *_ = zip(rows["bf16 / fp32"], rows["fp8 / fp32"], strict=True)
    assert 0 < error[0] < error[1] < 0.1
    assert 1 > cosine[0] > cosine[1] > 0.99
    assert 0 < divergence[0] < divergence[1]
