"""What differs between versions of Megatron-Core is found under every name."""

import functools
from types import SimpleNamespace

import pytest
import torch
from megatron.core.transformer.spec_utils import ModuleSpec

from laver_mcore.megatron import versions


@pytest.mark.parametrize("name", ["get_main_grads_for_grad_norm", "get_grads_for_grad_norm"])
def test_gradients_are_found_under_both_names(name):
    grads = [torch.ones(2)]
    assert versions.grads_for_norm(SimpleNamespace(**{name: lambda: grads})) is grads


def test_megatron_core_is_asked_to_write_itself_where_it_can_be_asked():
    def older(state, folder, async_sharded_save=False): ...

    def newer(state, folder, async_sharded_save=False, async_strategy="nvrx"): ...

    assert versions.own_writer(older) == {}
    assert versions.own_writer(newer) == {"async_strategy": "mcore"}


def test_submodules_are_found_in_a_spec_and_in_a_builder():
    parts = object()
    assert versions.submodules(ModuleSpec(module=torch.nn.Linear, submodules=parts)) is parts
    assert versions.submodules(functools.partial(torch.nn.Linear, submodules=parts)) is parts


def test_a_checkpoint_without_the_common_file_gets_it(tmp_path, monkeypatch):
    monkeypatch.setattr(
        versions.dist_checkpointing, "load_common_state_dict", lambda folder: {"folder": folder, "steps": 3}
    )
    versions.with_common_file(tmp_path)
    written = torch.load(tmp_path / "common.pt", weights_only=True)
    assert written == {"folder": str(tmp_path), "steps": 3}
    monkeypatch.setattr(versions.dist_checkpointing, "load_common_state_dict", lambda _: pytest.fail("again"))
    versions.with_common_file(tmp_path)
