"""The objective of docs/extending.md, installed as a package: found by entry point, trained and logged like ours."""

import json
from pathlib import Path

import pytest
import yaml
from sample_run import write_recipe, write_sample_data

from integration.harness import REPOSITORY, environment, python, read_checkpoint, read_metrics, torchrun

WEIGHT = 0.25
LAYOUTS = {
    "one_process": (1, ""),
    "tp2_sp": (2, "--tensor-model-parallel-size 2 --sequence-parallel"),
    "pp2": (2, "--pipeline-model-parallel-size 2"),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    directory = tmp_path_factory.mktemp("toy")
    write_sample_data(directory, num_samples=16)
    recipe = write_recipe(directory)
    package = directory / "installed" / "toy-1.0.dist-info"
    package.mkdir(parents=True)
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: toy\nVersion: 1.0\n")
    (package / "entry_points.txt").write_text("[laver_mcore.objectives]\necho = toy_objective:Echo\n")
    page = (REPOSITORY / "docs" / "extending.md").read_text()
    (package.parent / "toy_objective.py").write_text(page.split("```python\n")[1].split("```")[0])
    base = (
        f"pretrain_laver.py --config {recipe} --objective echo --lambda-echo {WEIGHT} "
        "--train-iters 4 --adam-eps 1e-3 --no-tensorboard"
    )
    for name, (ranks, flags) in LAYOUTS.items():
        argv = [*base.split(), *flags.split(), "--save", str(directory / name)]
        run = python if ranks == 1 else lambda *a, **v: torchrun(2, *a, **v)
        done = run(*argv, PYTHONPATH=path_with(package.parent))
        assert done.returncode == 0, done.stderr[-4000:]
    return directory


def path_with(folder: Path) -> str:
    """The harness's own path, and the installed package's."""
    return f"{folder}:{environment()['PYTHONPATH']}"


def test_it_is_trained_and_logged(runs):
    rows = read_metrics(runs / "one_process")
    assert len(rows) == 4
    for row in rows:
        assert row["loss"] == pytest.approx(row["lm_loss"] + WEIGHT * row["echo_loss"], rel=1e-6)
        assert not {"mim_loss", "gram_loss", "mask_ratio", "teacher_distance"} & set(row)
    assert rows[-1]["echo_loss"] < rows[0]["echo_loss"]


def test_its_parameters_train_and_are_kept(runs):
    """Under their own names, in checkpoints; and the account lists them as the model has them."""
    weights = {name: read_checkpoint(runs / "one_process", name) for name in ("offset", "reader.")}
    assert set(weights["offset"]) == {"offset"}
    assert set(weights["reader."]) == {"reader.layers.0.weight", "reader.layers.0.bias"}
    moments = read_checkpoint(runs / "one_process", "optimizer.state.exp_avg.")
    for name in ("offset", *weights["reader."]):
        assert any(key.endswith(name) and tensor.abs().sum() > 0 for key, tensor in moments.items()), name


def test_its_section_and_flags_are_known(runs):
    recipe = yaml.safe_load((runs / "one_process" / "config.yaml").read_text())
    assert recipe["objective"] == "echo"
    assert recipe["echo"] == {"lambda_echo": WEIGHT}


@pytest.mark.parametrize("layout", ["tp2_sp", "pp2"])
def test_layouts_agree(runs, layout):
    for got, wanted in zip(read_metrics(runs / layout), read_metrics(runs / "one_process"), strict=True):
        for name in ("loss", "lm_loss", "echo_loss", "grad_norm"):
            assert got[name] == pytest.approx(wanted[name], rel=2e-5), (name, json.dumps(got))
