"""A whole training step on a GPU: it makes the host wait for nothing, by torch's own account."""

import pytest
import torch
from integration.harness import host_waits
from sample_run import write_recipe, write_sample_data

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")]

VARIANTS = {
    "fp32": "",
    "bf16_distributed": "--bf16 --use-distributed-optimizer --overlap-grad-reduce",
}
if torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 9):
    VARIANTS["fp8_teacher"] = "--bf16 --teacher-precision fp8 --transformer-impl local"


@pytest.mark.parametrize("flags", VARIANTS.values(), ids=VARIANTS)
def test_step_does_not_wait_for_the_device(tmp_path, flags):
    write_sample_data(tmp_path)
    write_recipe(tmp_path)
    report = host_waits(tmp_path, tmp_path, flags)
    assert report["device"] == "cuda"
    assert report["num_steps"] == 2
    assert report["found"] == []
