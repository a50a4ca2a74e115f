"""A training step never waits for the device: on CPU no operation that would, on a GPU no synchronisation at all."""

import pytest

from integration.harness import host_waits
from integration.test_methods import write_target

VARIANTS = {
    "laver": "",
    "lm_only": "--objective lm",
    "released": "--gram ga --gram-scope micro_batch --mask-draw bernoulli",
    "bf16_distributed": "--bf16 --use-distributed-optimizer --overlap-grad-reduce",
    "recompute": "--recompute-granularity full",
    "fp8_teacher": "--teacher-precision fp8",
    "victor": "--objective victor --pool-size 64",
    "viral": "--objective viral --target-path {target} --target-layers 2",
}


@pytest.mark.parametrize("flags", VARIANTS.values(), ids=VARIANTS)
def test_step_does_not_wait_for_the_device(data_directory, tmp_path, flags):
    if "{target}" in flags:
        write_target(tmp_path / "target")
        flags = flags.format(target=tmp_path / "target")
    report = host_waits(data_directory, tmp_path, flags)
    assert report["num_steps"] == 2
    assert report["found"] == []


@pytest.mark.parametrize(
    "flags", ["", "--bf16 --recompute-granularity full"], ids=["plain", "bf16_recompute"]
)
def test_pipeline_stages_do_not_wait_for_shapes(data_directory, tmp_path, flags):
    """Micro-batches differ in length here, and both stages know them."""
    flags += " --pipeline-model-parallel-size 2 --no-packing"
    report = host_waits(data_directory, tmp_path, flags, num_ranks=2)
    assert report["num_steps"] == 2
    assert report["found"] == []
