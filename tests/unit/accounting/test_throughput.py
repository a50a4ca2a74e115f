"""Rates of the metrics line, from FLOPs counted by hand."""

import pytest

from laver_mcore.accounting.throughput import throughput
from laver_mcore.accounting.work import StepWork
from laver_mcore.config.presets import fill_from_preset
from laver_mcore.config.schema import Config, ModelConfig, TrainConfig, VisionConfig

# Qwen2.5-7B: what multiplies a row in the layers, and in the LM head.
LAYERS = 28 * (3584 * (28 + 2 * 4) * 128 + 28 * 128 * 3584 + 3 * 3584 * 18944)
HEAD = 3584 * 152064
TOKENS, SECONDS, GPUS = 4096, 3.0, 8


@pytest.mark.parametrize("peak", [None, 989.0], ids=["peak_unknown", "h100"])
def test_rates(peak):
    """6 FLOPs a weight and token over time and GPUs; padding counts as run, not as useful."""
    config = Config(
        model=fill_from_preset(ModelConfig(model="qwen2.5-7b")),
        vision=VisionConfig(vision="none"),
        train=TrainConfig(trainable=("*",)),
    )
    work = StepWork(dialogue_rows=TOKENS, supervised_rows=TOKENS // 2, student_padding=TOKENS // 4)
    found = throughput(config, 152064, work, SECONDS, GPUS, peak)
    useful = 6 * (LAYERS * TOKENS + HEAD * TOKENS / 2)
    run = useful + 6 * LAYERS * TOKENS / 4
    rates = [flops / SECONDS / GPUS / 1e12 for flops in (useful, run)]
    # The lowest matrix needs no gradient of its input only where the embedding does not train: here all do.
    assert found["tflops_per_gpu"] == pytest.approx(rates[0], rel=1e-12)
    assert found["padding_share"] == pytest.approx(1 / 5)
    if peak is None:
        assert found["mfu"] is None and found["hfu"] is None
    else:
        assert [found["mfu"], found["hfu"]] == pytest.approx([rate / peak for rate in rates], rel=1e-12)
