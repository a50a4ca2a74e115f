"""Validation in a run: its loss against training's on the same rows, its answers, and the checkpoint that it keeps."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from sample_run import write_recipe, write_sample_data

from integration.harness import Scenario, read_metrics, run_scenarios

ROOT = Path(__file__).resolve().parents[2]
LAYOUTS = {
    "tp1": (1, ""),
    "tp2_sp": (2, "--tensor-model-parallel-size 2 --sequence-parallel"),
    "pp2_interleaved": (2, "--pipeline-model-parallel-size 2 --num-virtual-stages-per-pipeline-rank 2"),
    "dp2": (2, "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather"),
    "cp2": (2, "--context-parallel-size 2"),
}


def evaluate(folder, data):
    command = [sys.executable, "tools/evaluate.py", "--checkpoint", str(folder), "--data", str(data)]
    subprocess.run([*command, "--max-new-tokens", "4"], check=True, cwd=ROOT, capture_output=True)
    return [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A short run; then, under every layout, one step at rate 0 from its weights, asked what they answer."""
    directory = tmp_path_factory.mktemp("validation")
    write_sample_data(directory / "data")
    recipe = write_recipe(directory / "data")
    first = f"--config {recipe} --train-iters 3"
    # Taught to say the same to everything; two held-out questions in three have that for their right answer.
    records = json.loads((directory / "data" / "train.json").read_text())
    for record in records:
        record["conversations"][1]["value"] = "red"
    (directory / "data" / "red.json").write_text(json.dumps(records))
    learning = (
        f"--config {recipe} --train-iters 30 --lr 5e-3 --data-path {directory}/data/red.json --objective lm"
    )
    run_scenarios(1, directory, [Scenario(name="first", argv=tuple(learning.split()))])
    for record in records[:9:3]:
        record["conversations"][1]["value"] = "left"
    held_out = directory / "data" / "held_out.json"
    held_out.write_text(json.dumps(records[:9]))
    asked = f"--valid-data-path {held_out} --eval-answers 9 --eval-answer-tokens 4 --eval-iters 1 --log-interval 5"
    asked += " --probe-interval 1"
    again = f"--config {recipe} --pretrained-checkpoint {directory}/first --lr 0 --train-iters 1 {asked}"
    same = f"{first} --lr 0 --valid-data-path {directory}/data/train.json --eval-iters 1 --eval-interval 2"
    moving = (
        f"{first} --valid-data-path {directory}/data/train.json --eval-interval 1 --save-best valid_lm_loss"
    )
    for ranks in (1, 2):
        scenarios = [
            Scenario(name=name, argv=tuple(f"{again} {flags}".split()))
            for name, (needed, flags) in LAYOUTS.items()
            if needed == ranks
        ]
        if ranks == 1:
            scenarios.append(Scenario(name="same", argv=tuple(same.split())))
            scenarios.append(Scenario(name="moving", argv=tuple(moving.split())))
        run_scenarios(ranks, directory, scenarios)
    return directory


def test_loss_is_trainings_on_the_same_rows(runs):
    """At rate 0 the first step's rows have the loss that they had in training; due at iteration 2 and at the end."""
    rows = read_metrics(runs / "same")
    assert ["valid_lm_loss" in row for row in rows] == [False, True, True]
    assert [row["valid_lm_loss"] for row in rows[1:]] == pytest.approx([rows[0]["lm_loss"]] * 2, rel=1e-6)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_agree(runs, layout):
    (row,), (alone,) = read_metrics(runs / layout), read_metrics(runs / "tp1")
    assert row["valid_lm_loss"] == pytest.approx(alone["valid_lm_loss"], rel=1e-6)
    assert row["valid_accuracy"] == alone["valid_accuracy"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_see_the_same_states(runs, layout):
    (row,), (alone,) = read_metrics(runs / layout), read_metrics(runs / "tp1")
    names = [name for name in alone if name.startswith("probe_")]
    assert len(names) == 3 * 4
    assert all(0 < alone[name] < 16 for name in names)
    assert [row[name] for name in names] == pytest.approx([alone[name] for name in names], rel=1e-4)


def test_accuracy_is_the_share_of_right_answers(runs):
    answers = evaluate(runs / "first", runs / "data" / "held_out.json")
    right = sum(row["answer"] == row["expected"] for row in answers) / 9
    assert right == pytest.approx(2 / 3)
    assert read_metrics(runs / "tp1")[0]["valid_accuracy"] == pytest.approx(right)


def test_the_best_checkpoint_is_kept(runs):
    losses = {row["iteration"]: row["valid_lm_loss"] for row in read_metrics(runs / "moving")}
    best = json.loads((runs / "moving" / "best" / "best.json").read_text())
    assert best == {
        "iteration": min(losses, key=losses.get),
        "metric": "valid_lm_loss",
        "value": min(losses.values()),
    }
    assert [path.name for path in (runs / "moving" / "best").glob("iter_*")] == [
        f"iter_{best['iteration']:07d}"
    ]
    answers = evaluate(runs / "moving" / "best", runs / "data" / "held_out.json")
    assert len(answers) == 9
