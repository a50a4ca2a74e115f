"""Variables that another job has left behind: one line that names them, and no wait."""

import os
import socket
import subprocess
import sys

import pytest

from laver_mcore.config.errors import ConfigError
from laver_mcore.config.schema import ParallelConfig
from laver_mcore.megatron import environment as environments
from laver_mcore.megatron.environment import check_environment, generation, prepare_for_gpus

GOOD = {
    "nothing": {},
    "one process": {"RANK": "0", "WORLD_SIZE": "1"},
    "torchrun": {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_PORT": "29500"},
}
BAD = {
    "no port": ({"WORLD_SIZE": "2", "RANK": "0"}, "WORLD_SIZE=2 without MASTER_PORT"),
    "rank alone": ({"RANK": "1"}, "RANK=1 is not below WORLD_SIZE=1"),
    "rank beyond": ({"RANK": "2", "WORLD_SIZE": "2", "MASTER_PORT": "1"}, "RANK=2 is not below WORLD_SIZE=2"),
    "rank negative": ({"RANK": "-1"}, "RANK='-1' is no whole number"),
    "port a word": ({"MASTER_PORT": "abc"}, "MASTER_PORT='abc' is no whole number"),
    "port empty": ({"MASTER_PORT": ""}, "MASTER_PORT='' is no whole number"),
    "port too high": ({"MASTER_PORT": "70000"}, "MASTER_PORT=70000 is no port"),
    "size zero": ({"WORLD_SIZE": "0"}, "WORLD_SIZE=0 is not at least 1"),
    "local rank a word": ({"LOCAL_RANK": "x"}, "LOCAL_RANK='x' is no whole number"),
}


@pytest.mark.parametrize("environment", GOOD.values(), ids=GOOD)
def test_accepted(environment):
    check_environment(environment)


@pytest.mark.parametrize(("environment", "message"), BAD.values(), ids=BAD)
def test_refused(environment, message):
    with pytest.raises(ConfigError, match=message):
        check_environment(environment)


def test_a_taken_port():
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        run = subprocess.run(
            [
                sys.executable,
                "-c",
                "from laver_mcore.megatron.parallel import init_distributed; init_distributed()",
            ],
            env=os.environ | {"MASTER_PORT": port, "RANK": "0", "WORLD_SIZE": "1"},
            capture_output=True,
            text=True,
            timeout=120,
        )
    assert run.returncode != 0
    assert f"ConfigError: MASTER_PORT={port} cannot be used" in run.stderr


QUEUES = "CUDA_DEVICE_MAX_CONNECTIONS"
# Layout, generation of the GPU, what the user has set -> the number of hardware queues, None for CUDA's own.
CONNECTIONS = {
    "Ampere, tensor": (dict(tensor_model_parallel_size=2), 8, {}, "1"),
    "Hopper, context": (dict(context_parallel_size=2), 9, {}, "1"),
    "Hopper, data alone": ({}, 9, {}, None),
    "Hopper, pipeline": (dict(pipeline_model_parallel_size=2), 9, {}, None),
    "Blackwell, tensor": (dict(tensor_model_parallel_size=2), 10, {}, None),
    "no GPU": (dict(tensor_model_parallel_size=2), None, {}, None),
    "the user's": (dict(tensor_model_parallel_size=2), 9, {QUEUES: "8"}, "8"),
}


@pytest.mark.parametrize(("sizes", "gpu", "given", "wanted"), CONNECTIONS.values(), ids=CONNECTIONS)
def test_hardware_queues_follow_layout_and_gpu(monkeypatch, sizes, gpu, given, wanted):
    monkeypatch.setattr(environments, "generation", lambda: gpu)
    environment = dict(given)
    prepare_for_gpus(ParallelConfig(**sizes), environment)
    assert environment.get(QUEUES) == wanted
    assert environment["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"


def test_the_users_allocator_stays():
    environment = {"PYTORCH_ALLOC_CONF": "backend:cudaMallocAsync"}
    prepare_for_gpus(ParallelConfig(), environment)
    assert environment["PYTORCH_ALLOC_CONF"] == "backend:cudaMallocAsync"


def test_cuda_finds_its_variables_before_torch_is_loaded(tmp_path):
    """A program that stops where it would load torch to train, having set what torch is to read."""
    code = """
import os, sys
from laver_mcore.cli import train
from laver_mcore.megatron import environment
environment.generation = lambda: 8
class Stop:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            print(os.environ["CUDA_DEVICE_MAX_CONNECTIONS"], os.environ["PYTORCH_ALLOC_CONF"])
            os._exit(0)
sys.meta_path.insert(0, Stop())
train.main("--model tiny --vision none --data-path x --tokenizer-model x --tensor-model-parallel-size 2".split())
"""
    hidden = {"CUDA_DEVICE_MAX_CONNECTIONS", "PYTORCH_ALLOC_CONF"}
    kept = {name: value for name, value in os.environ.items() if name not in hidden}
    done = subprocess.run(
        [sys.executable, "-c", code], env={**kept, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.stdout.split() == ["1", "expandable_segments:True"], done.stderr


class Nvml:
    """NVML's signatures: a status is returned, all else is written where a reference points."""

    def __init__(self, status):
        self.status = status

    def nvmlInit_v2(self):
        return self.status

    def nvmlDeviceGetHandleByIndex_v2(self, index, device):
        device._obj.value = 0x7F0000000001 + index
        return self.status

    def nvmlDeviceGetCudaComputeCapability(self, device, major, minor):
        major._obj.value, minor._obj.value = (9, 0) if device.value == 0x7F0000000001 else (0, 0)
        return self.status


@pytest.mark.parametrize(("status", "found"), [(0, 9), (9, None)], ids=["hopper", "driver not loaded"])
def test_generation_is_nvmls(monkeypatch, status, found):
    monkeypatch.setattr(environments.ctypes, "CDLL", lambda name: Nvml(status))
    assert generation() == found


def test_without_a_driver_there_is_no_generation():
    assert generation("libabsent.so.1") is None
