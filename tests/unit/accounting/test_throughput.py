"""Rates of the metrics line, from FLOPs counted by hand."""

from types import SimpleNamespace

import pytest
import torch

from laver_mcore.accounting.throughput import throughput
from laver_mcore.accounting.work import WORK, StepWork
from laver_mcore.config.presets import fill_from_preset
from laver_mcore.config.schema import Config, ModelConfig, RunConfig, TrainConfig, VisionConfig
from laver_mcore.train import loop

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
    assert found["tflops_per_gpu"] == pytest.approx(rates[0], rel=1e-12)
    assert found["padding_share"] == pytest.approx(1 / 5)
    if peak is None:
        assert found["mfu"] is None and found["hfu"] is None
    else:
        assert [found["mfu"], found["hfu"]] == pytest.approx([rate / peak for rate in rates], rel=1e-12)


def test_rates_of_an_interval(monkeypatch):
    """Two steps of different work in three seconds: the sum of both over all of the time, the step's being half."""
    now = [100.0]
    monkeypatch.setattr(loop.time, "perf_counter", lambda: now[0])
    config = Config(
        model=fill_from_preset(ModelConfig(model="qwen2.5-7b")),
        vision=VisionConfig(vision="none"),
        train=TrainConfig(trainable=("*",)),
        run=RunConfig(peak_tflops=50.0),
    )
    topology = SimpleNamespace(device=torch.device("cpu"), world_size=GPUS)
    interval = loop._Interval(
        SimpleNamespace(config=config, topology=topology, vocab_size=152064), enabled=True
    )
    for tokens, images in ((1000, 3), (3000, 5)):
        counts = dict.fromkeys(WORK, 0.0) | {"dialogue_rows": tokens, "images": images}
        interval.add(SimpleNamespace(work=torch.tensor(list(counts.values()), dtype=torch.float64)))
    now[0] += SECONDS
    found, each = interval.columns(data_wait_ms=2.0)
    assert each == found["step_seconds"] == SECONDS / 2
    assert found["tokens_per_second"] == pytest.approx(4000 / SECONDS)
    assert found["images_per_second"] == pytest.approx(8 / SECONDS)
    assert found["tflops_per_gpu"] == pytest.approx(6 * LAYERS * 4000 / SECONDS / GPUS / 1e12, rel=1e-12)
    assert found["mfu"] == pytest.approx(found["tflops_per_gpu"] / 50)
    interval.restart()
    now[0] += 1.0
    interval.add(SimpleNamespace(work=torch.tensor(list(counts.values()), dtype=torch.float64)))
    assert interval.columns(data_wait_ms=0.0)[0]["tokens_per_second"] == pytest.approx(3000)
