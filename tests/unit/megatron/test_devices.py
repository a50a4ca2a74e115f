"""What a machine's GPUs and drivers make of a run, from facts alone: one line, or nothing to say."""

import logging
import os
import sys

import pytest

from laver_mcore.config.errors import ConfigError
from laver_mcore.megatron.devices import DeviceFacts, check_devices
from laver_mcore.megatron.optimizer_state import _count_in_whole_steps
from laver_mcore.model import layer_spec
from tools.run_demo import ranks_for

DRIVER = "NVRM version: 470.57.02"
# Name -> (facts, local rank, words of the refusal; None: none).
MACHINES = {
    "laptop": (dict(driver=None, cuda=None, count=0, hidden=False), 1, None),
    "CUDA build without a GPU": (dict(driver=None, cuda="13.0", count=0, hidden=False), 1, None),
    "two GPUs": (dict(driver=DRIVER, cuda="13.0", count=2, hidden=False), 1, None),
    "hidden": (dict(driver=DRIVER, cuda="13.0", count=0, hidden=True), 1, None),
    "more ranks than GPUs": (
        dict(driver=DRIVER, cuda="13.0", count=1, hidden=False),
        1,
        "LOCAL_RANK=1, but there are 1 GPU",
    ),
    "old driver": (
        dict(driver=DRIVER, cuda="13.0", count=0, hidden=False),
        0,
        "torch was built for CUDA 13.0 and cannot use this machine's driver",
    ),
}


@pytest.mark.parametrize("name", MACHINES)
def test_machines(name):
    facts, local_rank, words = MACHINES[name]
    if words is None:
        check_devices(local_rank, DeviceFacts(**facts))
        return
    with pytest.raises(ConfigError, match=words) as refused:
        check_devices(local_rank, DeviceFacts(**facts))
    assert "\n" not in str(refused.value)


def test_a_cpu_build_on_a_gpu_machine_is_said(caplog):
    with caplog.at_level(logging.WARNING):
        check_devices(0, DeviceFacts(driver=DRIVER, cuda=None, count=0, hidden=False))
    assert "torch is a build for CPUs" in caplog.text


def test_the_demo_takes_no_more_ranks_than_gpus():
    assert [ranks_for(gpus) for gpus in (0, 1, 2, 8)] == [2, 1, 2, 2]


@pytest.fixture
def broken_engine(monkeypatch):
    """Transformer Engine is found and its library does not load."""

    def load(name):
        raise OSError("libcudart.so.12: cannot open shared object file\nmore of it")

    monkeypatch.setattr(layer_spec.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(layer_spec.importlib, "import_module", load)
    monkeypatch.setattr(layer_spec.torch.cuda, "is_available", lambda: True)
    layer_spec.transformer_engine_lacks.cache_clear()
    yield
    layer_spec.transformer_engine_lacks.cache_clear()


def test_an_engine_that_does_not_load_is_one_line_and_local_layers(broken_engine, caplog):
    with caplog.at_level(logging.WARNING):
        assert not layer_spec.use_transformer_engine("auto", bf16=True)
        assert not layer_spec.use_transformer_engine("auto", bf16=True)
    (record,) = caplog.records
    said = record.getMessage()
    assert said.startswith(
        "Transformer Engine cannot be loaded (libcudart.so.12: cannot open shared object file); "
    )
    assert said.endswith("local layers instead")
    demanded = r"transformer_impl=transformer_engine, but it cannot be loaded here \(libcudart"
    with pytest.raises(ConfigError, match=demanded):
        layer_spec.use_transformer_engine("transformer_engine", bf16=True)
    assert not layer_spec.use_transformer_engine("local", bf16=True)


# transformer_impl, bf16 -> whether an engine that loads is used: it multiplies fp32 in TF32.
ENGINES = {
    "auto_bf16": ("auto", True, True),
    "auto_fp32": ("auto", False, False),
    "demanded_fp32": ("transformer_engine", False, True),
    "local_bf16": ("local", True, False),
}


@pytest.mark.parametrize(("impl", "bf16", "used"), ENGINES.values(), ids=ENGINES)
def test_fp32_takes_local_layers(monkeypatch, impl, bf16, used):
    monkeypatch.setattr(layer_spec, "transformer_engine_lacks", lambda: None)
    assert layer_spec.use_transformer_engine(impl, bf16) == used


def test_steps_are_whole_numbers():
    """A float is what torch's Adam counts in; Transformer Engine's FusedAdam and apex's take an int."""
    state = {"optimizer": {"param_groups": [{"step": 10.0, "lr": 0.5}, {"lr": 1.0}, {"step": 3}]}}
    _count_in_whole_steps(state)
    steps = [group.get("step") for group in state["optimizer"]["param_groups"]]
    assert steps == [10, None, 3] and type(steps[0]) is int
    assert state["optimizer"]["param_groups"][0]["lr"] == 0.5


def test_tests_of_process_groups_see_no_gpu():
    """`make test` on a machine with GPUs runs what it runs everywhere; those of GPUs are asked for by name."""
    if not any("tests/gpu" in argument for argument in sys.argv):
        assert os.environ["CUDA_VISIBLE_DEVICES"] == ""
