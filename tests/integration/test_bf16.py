"""bfloat16 with fp32 masters on two data-parallel ranks: losses near fp32, and a teacher that averages the masters."""

import math
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from sample_run import write_recipe, write_sample_data

from integration.harness import Scenario, read_metrics, run_scenarios

RUNS = {"fp32": "", "bf16": "--bf16", "bf16_distributed": "--bf16 --use-distributed-optimizer"}
# At this rate a step is smaller than a bf16 weight can show: only fp32 masters collect such steps.
SETTINGS = "--train-iters 4 --lr 1e-5 --ema-steps 2 --save-interval 2"
IN_BF16 = ("bf16", "bf16_distributed")
# Where the two optimizers keep their fp32 masters in a checkpoint.
MASTERS = {"bf16": "optimizer.state.fp32_param.", "bf16_distributed": "optimizer.state.param."}
AVERAGED = ("language_model.", "vision_head.")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    directory = tmp_path_factory.mktemp("bf16")
    write_sample_data(directory, num_samples=24)
    recipe = write_recipe(directory)
    scenarios = [
        Scenario(name=name, argv=tuple(f"--config {recipe} {SETTINGS} {flags}".split()))
        for name, flags in RUNS.items()
    ]
    run_scenarios(2, directory, scenarios)
    return directory


def read_tensors(run: Path, iteration: int) -> dict[str, torch.Tensor]:
    """Every whole tensor of one checkpoint."""
    reader = dcp.FileSystemReader(run / f"iter_{iteration:07d}")
    metadata = reader.read_metadata().state_dict_metadata
    state = {
        k: torch.empty(e.size, dtype=e.properties.dtype) for k, e in metadata.items() if hasattr(e, "size")
    }
    dcp.load(state, storage_reader=reader, no_dist=True)
    return state


def under(prefix: str, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    found = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
    return {name: tensor for name, tensor in found.items() if name.startswith(AVERAGED)}


def difference(got: torch.Tensor, wanted: torch.Tensor) -> float:
    """Relative to the wanted tensor's own length; biases start at zero and stay near it."""
    return ((got.double() - wanted.double()).norm() / wanted.double().norm().clamp(min=1e-12)).item()


@pytest.mark.parametrize("name", IN_BF16)
def test_losses_are_near_those_of_fp32(runs, name):
    got, wanted = read_metrics(runs / name), read_metrics(runs / "fp32")
    assert len(got) == len(wanted) == 4
    for a, b in zip(got, wanted, strict=True):
        assert a["skipped"] == 0
        for loss in ("loss", "lm_loss", "mim_loss", "gram_loss", "grad_norm", "visual_similarity"):
            assert math.isfinite(a[loss])
            assert a[loss] == pytest.approx(b[loss], rel=0.03, abs=1e-6), (loss, a["iteration"])
    assert got[-1]["mim_loss"] > 1


@pytest.mark.parametrize("name", IN_BF16)
def test_teacher_moves(runs, name):
    got, wanted = read_metrics(runs / name), read_metrics(runs / "fp32")
    assert [row["teacher_distance"] > 0 for row in got] == [False, True, True, True]
    assert got[-1]["teacher_distance"] != got[1]["teacher_distance"]
    for iteration in (1, 3):
        assert got[iteration]["teacher_distance"] == pytest.approx(
            wanted[iteration]["teacher_distance"], rel=0.03
        )


@pytest.mark.parametrize("name", IN_BF16)
def test_teacher_is_an_average_of_the_fp32_masters(runs, name):
    before, after = read_tensors(runs / name, 2), read_tensors(runs / name, 4)
    momentum = read_metrics(runs / name)[3]["momentum"]
    start, end = under("teacher.", before), under("teacher.", after)
    masters, weights = under(MASTERS[name], after), under("", after)
    assert set(end) == set(masters) == set(weights)
    assert len(end) > 10
    squares = torch.zeros(2, dtype=torch.float64)
    for parameter, average in end.items():
        assert average.dtype == masters[parameter].dtype == torch.float32
        assert weights[parameter].dtype == torch.bfloat16
        wanted = momentum * start[parameter].double() + (1 - momentum) * masters[parameter].double()
        assert difference(average, wanted) < 1e-6, parameter
        for i, goal in enumerate((masters[parameter], weights[parameter])):
            squares[i] += (1 - momentum) ** 2 * (goal.double() - start[parameter].double()).square().sum()
    to_masters, to_weights = squares.sqrt().tolist()
    assert read_metrics(runs / name)[3]["teacher_distance"] == pytest.approx(to_masters, rel=1e-4)
    # An average of the rounded weights would have moved by another length.
    assert to_weights != pytest.approx(to_masters, rel=0.05)


@pytest.mark.parametrize("iteration", [2, 4])
def test_both_optimizers_lead_to_the_same_teacher(runs, iteration):
    wanted = under("teacher.", read_tensors(runs / "bf16", iteration))
    got = under("teacher.", read_tensors(runs / "bf16_distributed", iteration))
    assert set(got) == set(wanted)
    whole = difference(
        torch.cat([got[n].flatten() for n in wanted]), torch.cat([t.flatten() for t in wanted.values()])
    )
    assert whole < 1e-5
    for name, average in wanted.items():
        if not name.endswith("bias"):
            assert difference(got[name], average) < 1e-5, name
