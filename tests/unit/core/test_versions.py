"""What is asked of Megatron-Core is answered by what it does: planted versions of it, before and after a repair."""

from types import SimpleNamespace

import pytest
import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from laver_mcore.megatron import optimizer, versions


@pytest.mark.parametrize("name", ["get_main_grads_for_grad_norm", "get_grads_for_grad_norm"])
def test_gradients_are_found_under_both_names(name):
    grads = [torch.ones(2)]
    assert versions.grads_for_norm(SimpleNamespace(**{name: lambda: grads})) is grads


@pytest.fixture
def buffers(monkeypatch):
    """One buffer of two buckets, the first padded from three elements to four."""
    buckets = [SimpleNamespace(numel_unpadded=3), SimpleNamespace(numel_unpadded=5)]
    buffer = SimpleNamespace(
        param_index_map={"a": (0, 3, 0), "b": (4, 9, 1)}, bucket_indices=[(0, 4), (4, 12)], buckets=buckets
    )
    monkeypatch.setattr(optimizer, "_distributed", lambda _: [SimpleNamespace(buffers=[buffer])])
    versions.shifts_moments.cache_clear()
    yield [buffer]
    versions.shifts_moments.cache_clear()


def repaired_upstream(stub, weights, metadata):
    """Cuts where the elements are: after what gathering has kept of the buckets before."""
    buffer, flat = stub.buffers[0], stub.get_parameter_state_dp_zero()[0]["float"]["exp_avg"]
    cuts, kept, seen = [], 0, 0
    for start, end, bucket in buffer.param_index_map.values():
        while seen < bucket:
            kept += buffer.buckets[seen].numel_unpadded
            seen += 1
        at = kept + start - buffer.bucket_indices[bucket][0]
        cuts.append({"exp_avg": SimpleNamespace(data=flat[at : at + end - start])})
    return dict(enumerate(cuts))


def shifted_upstream(stub, weights, metadata):
    flat = stub.get_parameter_state_dp_zero()[0]["float"]["exp_avg"]
    cuts = stub.buffers[0].param_index_map.values()
    return {i: {"exp_avg": SimpleNamespace(data=flat[start:end])} for i, (start, end, _) in enumerate(cuts)}


@pytest.mark.parametrize(("upstream", "start"), [(shifted_upstream, 3), (repaired_upstream, 4)])
def test_moments_are_shifted_back_once(monkeypatch, buffers, upstream, start):
    monkeypatch.setattr(DistributedOptimizer, "sharded_param_state_fully_reshardable", upstream)
    with optimizer.coalesced_offsets(None):
        assert buffers[0].param_index_map == {"a": (0, 3, 0), "b": (start, start + 5, 1)}
    assert buffers[0].param_index_map == {"a": (0, 3, 0), "b": (4, 9, 1)}


def test_the_installed_version_is_asked(buffers):
    """The probe runs through the real method; the tests of layouts look at what is saved then."""
    assert versions.shifts_moments() in (True, False)
