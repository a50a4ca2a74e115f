"""A step on an accelerator meets no host tensor: built and run on fake tensors, which refuse to be mixed."""

import json

import pytest

from integration.harness import python

VARIANTS = {
    "distributed": "--bf16 --use-distributed-optimizer --overlap-grad-reduce",
    "offloaded": "--bf16 --offload-teacher --recompute-granularity full",
    "released": "--gram ga --gram-scope micro_batch --mask-draw bernoulli --no-mixed-attention --no-rope-2d",
    "spoiled": "--bf16",
}


@pytest.fixture(scope="module")
def answers(data_directory):
    named = [word for item in VARIANTS.items() for word in item]
    worker = ("-W", "ignore", "tests/integration/device_worker.py", str(data_directory))
    done = python(*worker, *named, TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", [name for name in VARIANTS if name != "spoiled"])
def test_everything_is_on_the_device(answers, name):
    assert answers[name] == ["pretended:0"] * 5


def test_a_host_tensor_is_found(answers):
    """The variant whose step leaves its tensors on the host."""
    assert "cpu" in answers["spoiled"] and "pretended:0" in answers["spoiled"], answers["spoiled"]
