"""Groups' rates with their multipliers, and clipping that never scales up."""

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from laver_mcore.megatron.optimizer import apply_gradients, set_rates, used_learning_rate


@pytest.fixture(scope="module")
def group():
    joined = dist.is_initialized()
    if not joined:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.new_group([dist.get_rank()])
    if not joined:
        dist.destroy_process_group()


class Optimizer:
    """What `apply_gradients` asks of Megatron's optimizer, around torch's Adam."""

    def __init__(self, parameters: list[torch.nn.Parameter], clip: float, group) -> None:
        self.optimizer = torch.optim.AdamW(parameters, fused=True)
        self.config, self._group, self._parameters = SimpleNamespace(clip_grad=clip), group, parameters

    @property
    def param_groups(self):
        return self.optimizer.param_groups

    def prepare_grads(self) -> bool:
        return False

    def get_main_grads_for_grad_norm(self):
        return [parameter.grad for parameter in self._parameters]

    def get_grad_stats_parallel_group(self):
        return self._group

    def step_with_ready_grads(self) -> bool:
        self.optimizer.step()
        return True


@pytest.mark.parametrize(
    ("norm", "clip", "scale"),
    [(4.0, 1.0, 0.25), (1.5, 3.0, 1.0), (0.01, 1.0, 1.0), (50.0, 0.0, 1.0)],
    ids=["above", "below", "far_below", "off"],
)
def test_first_moment_shows_the_clipped_gradient(monkeypatch, group, norm, clip, scale):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: torch.device("cpu"))
    gradient = torch.tensor([0.6, -0.8])
    parameter = torch.nn.Parameter(torch.ones(2))
    parameter.grad = norm * gradient
    optimizer = Optimizer([parameter], clip, group)
    found, applied = apply_gradients(optimizer)
    assert found.item() == pytest.approx(norm, rel=1e-6)
    assert bool(applied)
    first = optimizer.optimizer.state[parameter]["exp_avg"] / 0.1  # 1 - beta1, from a first moment of zero
    torch.testing.assert_close(first, scale * norm * gradient, rtol=1e-5, atol=0)


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_a_gradient_that_is_not_finite_changes_nothing(monkeypatch, group, bad):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: torch.device("cpu"))
    parameter = torch.nn.Parameter(torch.ones(2))
    optimizer = Optimizer([parameter], 1.0, group)
    for gradient in ([1.0, 1.0], [bad, 1.0]):
        before, state = parameter.detach().clone(), {}
        if optimizer.optimizer.state:
            state = {k: v.clone() for k, v in optimizer.optimizer.state[parameter].items()}
        parameter.grad = torch.tensor(gradient)
        _, applied = apply_gradients(optimizer)
    assert not bool(applied)
    assert torch.equal(parameter, before)
    assert all(torch.equal(optimizer.optimizer.state[parameter][k], v) for k, v in state.items())


def test_groups_have_their_multipliers():
    groups = [{"lr": 9.0}, {"lr_mult": 0.1, "wd_mult": 0.0, "lr": 9.0}, {"wd_mult": 0.5, "lr": 9.0}]
    set_rates(SimpleNamespace(param_groups=groups), 2e-3, 0.1)
    assert [group["lr"] for group in groups] == pytest.approx([2e-3, 2e-4, 2e-3])
    assert [group["weight_decay"] for group in groups] == pytest.approx([0.1, 0.0, 0.05])


def test_the_rate_is_read_back_from_the_groups():
    inner = SimpleNamespace(param_groups=[{"lr": 2e-2, "lr_mult": 10.0}, {"lr": 2e-3}])
    found = used_learning_rate(SimpleNamespace(optimizer=inner), torch.device("cpu"))
    assert found.item() == pytest.approx(2e-3)
    assert found.dtype == torch.float64
