"""The papers' recipes, read as they are, take two steps on tiny random parts."""

from pathlib import Path

import pytest

from integration.harness import REPOSITORY, Scenario, read_metrics, run_scenarios
from integration.test_methods import write_target

# Recipe -> flags that make its objective's parts small, losses beside the language model's.
RECIPES = {
    "qwen2.5-7b-siglip2/stage1": ("", ()),
    "qwen2.5-7b-siglip2/stage2": ("--vision-head-hidden-size 32", ("mim_loss", "gram_loss")),
    "qwen2.5-7b-siglip2/stage3": ("", ()),
    "victor-qwen2.5-7b-siglip2/stage1": ("", ()),
    "victor-qwen2.5-7b-siglip2/stage1.5": ("--pool-size 64", ("reconstruction_loss",)),
    "victor-qwen2.5-7b-siglip2/stage2": ("", ()),
    "viral-qwen2.5-7b-clip/stage1": ("", ()),
    "viral-qwen2.5-7b-clip/stage2": (
        "--target-path {tower} --target-layers 2 --projector-hidden-size 16",
        ("alignment_loss",),
    ),
}
TINY = """
    --model tiny --num-layers 2 --hidden-size 64 --ffn-hidden-size 128 --vision {kind} --vision-path {tower}
    --vision-random-init --data-path {data}/train.json --image-folder {data} --tokenizer-model {data}/tokenizer.model
    --seq-length 128 --pad-to-multiple 16 --global-batch-size 4 --train-iters 2 --hf-path None
    --tensor-model-parallel-size 1 --no-sequence-parallel --log-interval 1 --save-interval None
"""


@pytest.fixture(scope="module")
def runs(data_directory, tmp_path_factory):
    directory = tmp_path_factory.mktemp("recipes")
    tower = directory / "tower"
    write_target(tower)
    scenarios = []
    for name, (smaller, _) in RECIPES.items():
        flags = f"{TINY} {smaller}".format(kind="dinov2", tower=tower, data=data_directory)
        recipe = REPOSITORY / "examples" / f"{name}.yaml"
        scenarios.append(
            Scenario(name=name.replace("/", "-"), argv=("--config", str(recipe), *flags.split()))
        )
    run_scenarios(1, directory, scenarios)
    return directory


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_trains(runs: Path, name):
    rows = read_metrics(runs / name.replace("/", "-"))
    assert len(rows) == 2
    assert all(row["lm_loss"] > 0 and row["grad_norm"] > 0 and row["skipped"] == 0 for row in rows)
    losses = {key for key in rows[0] if key.endswith("_loss")} - {"lm_loss"}
    assert losses == set(RECIPES[name][1])
