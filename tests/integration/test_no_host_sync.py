"""A training step never waits for the device: on CPU no operation that would, on a GPU no synchronisation at all."""

import pytest

from integration.harness import host_waits

VARIANTS = {
    "laver": "",
    "lm_only": "--objective lm",
    "released": "--gram ga --gram-scope micro_batch --mask-draw bernoulli",
    "bf16_distributed": "--bf16 --use-distributed-optimizer --overlap-grad-reduce",
    "recompute": "--recompute-granularity full",
    "fp8_teacher": "--teacher-precision fp8",
}


@pytest.mark.parametrize("flags", VARIANTS.values(), ids=VARIANTS)
def test_step_does_not_wait_for_the_device(data_directory, tmp_path, flags):
    report = host_waits(data_directory, tmp_path, flags)
    assert report["num_steps"] == 2
    assert report["found"] == []
