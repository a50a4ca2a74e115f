"""`--dry-run` and the planner say the same of the same layout; FLOPs in units."""

from pathlib import Path

import pytest

from laver_mcore.accounting.devices import GPUS
from laver_mcore.accounting.flops import step_flops
from laver_mcore.accounting.tables import in_units, memory_table
from laver_mcore.accounting.typical import typical_mix, typical_work
from laver_mcore.config.load import from_recipe, resolve
from laver_mcore.dry_run import _step_lines
from laver_mcore.plan.layouts import Layout
from laver_mcore.plan.predict import Setting, predict

RECIPE = Path(__file__).resolve().parents[3] / "examples/qwen2.5-7b-siglip2/stage2.yaml"
LAYOUT = Layout(tp=2, pp=2, vp=1, cp=1, dp=4, micro_batch=2, recompute="full")


def test_the_same_table():
    config = LAYOUT.apply(resolve(from_recipe(RECIPE)))
    mix = typical_mix(config)
    setting = Setting(gpu=GPUS["h200"], num_gpus=16, mix=mix, vocab_size=152064, matmul_efficiency=0.5)
    lines = _step_lines(config, 152064, LAYOUT.dp)
    assert lines[-3:] == memory_table(predict(config, LAYOUT, setting).memory)
    step = 128 // LAYOUT.micro_batch * step_flops(config, 152064, typical_work(config, mix)).total.model
    assert lines[1].startswith(f"{step / 1e15:.1f} PFLOP useful, ")


@pytest.mark.parametrize(
    ("flops", "said"),
    [
        (2.14e16, "21.4 PFLOP"),
        (1e15, "1.0 PFLOP"),
        (3.2e12, "3.2 TFLOP"),
        (6.4e8, "0.6 GFLOP"),
        (0, "0.0 GFLOP"),
    ],
)
def test_units(flops, said):
    assert in_units(flops) == said
