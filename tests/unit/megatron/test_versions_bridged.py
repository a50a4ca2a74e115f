"""What differs between versions of Megatron-Core is found under every name."""

from types import SimpleNamespace

import pytest
import torch

from laver_mcore.megatron import versions


@pytest.mark.parametrize("name", ["get_main_grads_for_grad_norm", "get_grads_for_grad_norm"])
def test_gradients_are_found_under_both_names(name):
    grads = [torch.ones(2)]
    assert versions.grads_for_norm(SimpleNamespace(**{name: lambda: grads})) is grads
