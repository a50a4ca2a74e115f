"""The shipped recipes use the GPUs that they name about as well as the planner knows how to."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
from long import LONG

from laver_mcore.accounting.devices import GPUS
from laver_mcore.accounting.typical import typical_mix
from laver_mcore.config.load import parse
from laver_mcore.plan.layouts import Layout
from laver_mcore.plan.predict import predict
from laver_mcore.plan.search import search
from laver_mcore.plan.setting import Setting

EXAMPLES = Path(__file__).resolve().parents[3] / "examples"
RECIPES = sorted(path for path in EXAMPLES.glob("*/stage*.yaml") if path.parent.name != "demo")
# What the base of all of them says.
NUM_GPUS, GPU = re.findall(
    r"finds for (\d+) x ([\w-]+);", (EXAMPLES / "qwen2.5-7b-siglip2/base.yaml").read_text()
)[0]


def case(path):
    return pytest.param(
        path,
        id=f"{path.parent.name}/{path.stem}",
        marks=[] if path.parent.name == "qwen2.5-7b-siglip2" else LONG,
    )


@pytest.mark.parametrize("path", map(case, RECIPES))
def test_a_recipe_is_within_5_percent_of_the_best_layout(path):
    config, _ = parse(["--config", str(path), "--dry-run"])
    sizes, num_gpus = config.parallel, int(NUM_GPUS)
    shipped = Layout(
        tp=sizes.tensor_model_parallel_size,
        pp=sizes.pipeline_model_parallel_size,
        vp=sizes.num_virtual_stages_per_pipeline_rank or 1,
        cp=sizes.context_parallel_size,
        dp=num_gpus // sizes.tensor_model_parallel_size // sizes.pipeline_model_parallel_size,
        micro_batch=config.train.micro_batch_size,
        recompute=sizes.recompute_granularity,
    )
    assert replace(shipped.apply(config), parallel=sizes) == config
    gpu = GPUS[GPU]
    setting = Setting(
        gpu=gpu,
        num_gpus=num_gpus,
        mix=typical_mix(config),
        vocab_size=config.model.vocab_size,
        matmul_efficiency=gpu.matmul,
    )
    found = predict(config, shipped, setting)
    assert found.fits(gpu)
    assert found.seconds <= 1.05 * search(config, setting).feasible[0].seconds
