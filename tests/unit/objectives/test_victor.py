"""ViCToR's matching, replacement and loss against brute force and the paper's formula in fp64."""

import itertools
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment

from laver_mcore.config.errors import ConfigError
from laver_mcore.config.schema import Config, ModelConfig, TrainConfig, VisionConfig
from laver_mcore.model.method import ModelOutput
from laver_mcore.objectives.head import Head
from laver_mcore.objectives.matching import distances, match
from laver_mcore.objectives.victor import LOSS, Victor, VictorConfig

WIDTH, GRIDS = 12, ((3, 4), (2, 2), (1, 1))
KEYS = (("a", 0), ("a", 1), ("b", 0))
TOPOLOGY = SimpleNamespace(
    device=torch.device("cpu"), tp_cp_group=SimpleNamespace(rank=lambda: 0, size=lambda: 1)
)


def recipe(**settings) -> Config:
    return Config(
        model=ModelConfig(hidden_size=WIDTH, num_layers=2),
        vision=VisionConfig(vision="encoder-free", normalize_visual_tokens=True),
        objective=VictorConfig(**{"pool_size": 16} | settings),
        train=TrainConfig(seed=3),
    )


def batch_of(grids=GRIDS, keys=KEYS):
    lengths = tuple(h * w for h, w in grids)
    rows = torch.arange(sum(lengths)) + 2
    return SimpleNamespace(image_grids=grids, image_keys=keys, image_lengths=lengths, visual_rows_N=rows)


def made(**settings):
    torch.manual_seed(0)
    config = recipe(**settings)
    pool = torch.nn.Parameter(torch.randn(config.objective.pool_size, WIDTH))
    head = Head((WIDTH, WIDTH), torch.nn.Identity, dtype=torch.float32, device="cpu")
    return Victor(config, TOPOLOGY, pool, head)


def tokens(num: int) -> torch.Tensor:
    found = torch.randn(num, WIDTH, generator=torch.Generator().manual_seed(1))
    return torch.nn.functional.normalize(found, dim=-1).requires_grad_()


def brute_force(cost: np.ndarray) -> float:
    rows, columns = cost.shape
    return min(
        sum(cost[i, c] for i, c in enumerate(chosen))
        for chosen in itertools.permutations(range(columns), rows)
    )


@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (2, 2), (3, 5), (4, 4), (4, 7)])
@pytest.mark.parametrize("kind", ["random", "ties", "one_near_to_all"])
def test_match_is_the_cheapest_assignment(shape, kind):
    generator = np.random.default_rng(sum(shape))
    for _ in range(20):
        cost = generator.random(shape).astype(np.float32)
        if kind == "ties":
            cost = np.round(2 * cost)
        if kind == "one_near_to_all":
            cost[:, 0] = 0.0
        chosen = match(cost)
        assert len(set(chosen.tolist())) == shape[0]
        assert cost[np.arange(shape[0]), chosen].sum() == pytest.approx(brute_force(cost), abs=1e-6)


def test_leaving_far_columns_out_changes_no_total():
    generator = np.random.default_rng(0)
    for rows, columns in ((30, 200), (50, 60), (20, 400)):
        cost = generator.random((rows, 1)) + generator.random((rows, columns)) * generator.random(columns)
        _, whole = linear_sum_assignment(cost)
        index = np.arange(rows)
        assert cost[index, match(cost)].sum() == pytest.approx(cost[index, whole].sum(), rel=1e-12)


def test_no_token_has_no_row():
    assert match(np.zeros((0, 5), dtype=np.float32)).shape == (0,)


def test_distances_are_euclidean_and_fp32():
    a, b = torch.randn(5, WIDTH).bfloat16(), torch.randn(7, WIDTH).bfloat16()
    found = distances(a, b)
    assert found.dtype == torch.float32
    wanted = np.sqrt(((a.double().numpy()[:, None] - b.double().numpy()[None]) ** 2).sum(-1))
    assert np.allclose(found.numpy(), wanted, rtol=1e-5)


@pytest.mark.parametrize("share", [0.75, 0.5, 1.0, 0.0])
def test_all_but_the_kept_share_is_replaced(share):
    config = recipe(replaced_share=share)
    for num in (1, 3, 4, 12, 729):
        mask = config.objective.mask(config, num, key="a", image_index=0, iteration=2)
        assert (~mask).sum() == int((1 - share) * num)
    draws = [
        config.objective.mask(config, 729, key=key, image_index=index, iteration=iteration)
        for key, index, iteration in (("a", 0, 2), ("b", 0, 2), ("a", 1, 2), ("a", 0, 3))
    ]
    if 0.0 < share < 1.0:
        assert not any((draws[0] == other).all() for other in draws[1:])


@pytest.mark.parametrize("normalize", [False, True])
def test_replaced_tokens_become_rows_of_the_cheapest_assignment(normalize):
    victor = made(normalize_pool=normalize, replaced_share=0.5)
    batch = batch_of(((2, 4), (2, 2)), KEYS[:2])
    plan, visual = victor.plan(batch, 4), tokens(12)
    entering = victor.enter(visual, plan)
    pool = victor._pool.detach().double()
    if normalize:
        pool = pool / pool.norm(dim=-1, keepdim=True)
    masks = [
        victor._config.mask(victor._recipe, n, key="a", image_index=i, iteration=4)
        for i, n in enumerate((8, 4))
    ]
    start = 0
    for mask in masks:
        mine = visual.detach().double()[start : start + len(mask)][torch.from_numpy(mask)]
        cost = torch.cdist(mine, pool).numpy()
        got = entering.dialogue_ND.detach().double()[start : start + len(mask)][torch.from_numpy(mask)]
        rows = torch.cdist(got, pool).argmin(-1).tolist()
        assert len(set(rows)) == len(rows)
        _, best = linear_sum_assignment(cost)
        assert cost[np.arange(len(rows)), rows].sum() == pytest.approx(
            cost[np.arange(len(rows)), best].sum(), rel=1e-6
        )
        kept = torch.from_numpy(~mask)
        assert torch.equal(
            entering.dialogue_ND[start : start + len(mask)][kept], visual[start : start + len(mask)][kept]
        )
        start += len(mask)
    assert torch.equal(entering.travelling[0], visual)
    assert not entering.travelling[0].requires_grad


def test_gradients_reach_chosen_rows_and_kept_tokens_alone():
    victor, visual = made(), tokens(17)
    plan = victor.plan(batch_of(), 0)
    entering = victor.enter(visual, plan)
    entering.dialogue_ND.sum().backward()
    rows = torch.cdist(entering.dialogue_ND.detach()[plan.replaced_R], victor._pool.detach()).argmin(-1)
    chosen = torch.zeros(16, dtype=torch.bool)
    chosen[rows] = True
    assert 0 < chosen.sum() < 16
    assert torch.equal((victor._pool.grad != 0).any(-1), chosen)
    assert (victor._pool.grad[~chosen] == 0).all()
    kept = torch.ones(17, dtype=torch.bool)
    kept[plan.replaced_R] = False
    assert torch.equal(visual.grad, kept[:, None].float().expand(-1, WIDTH))


def test_loss_and_gradients_are_the_formula():
    """Smooth L1 by its two branches; mean over dimensions, summed over all tokens, which are the count."""
    victor, visual = made(smooth_l1_beta=0.05), tokens(17).detach() * 1.7
    batch = batch_of()
    plan = victor.plan(batch, 0)
    states = torch.randn(25, WIDTH, requires_grad=True)
    output = ModelOutput(
        dialogue_TD=states, images_ND=None, target_NK=None, travelling=(visual,), output_weight_VD=states
    )
    found = victor.sums(output, plan)
    found[LOSS].backward()
    assert plan.counts == {LOSS: 17}
    weight, bias = (p.detach().double() for p in victor._head.parameters())
    twin = states.detach().double().requires_grad_()
    weight.requires_grad_()
    predicted = twin[batch.visual_rows_N] @ weight.T + bias
    target = visual.double() / visual.double().norm(dim=-1, keepdim=True)
    apart = (predicted - target).abs()
    wanted = torch.where(apart < 0.05, apart**2 / (2 * 0.05), apart - 0.05 / 2).sum() / WIDTH
    wanted.backward()
    assert found[LOSS].item() == pytest.approx(wanted.item(), rel=1e-6)
    torch.testing.assert_close(states.grad.double(), twin.grad, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(victor._head.layers[0].weight.grad.double(), weight.grad, rtol=1e-5, atol=1e-6)


def test_a_step_looks_ahead_and_waits_once():
    victor, visual = made(), tokens(17)
    plan = victor.plan(batch_of(), 0)
    victor.prepare(visual, plan)
    answers = dict(plan.answers)
    assert sorted(answers) == [0, 1, 2]
    ahead = victor.enter(visual, plan).dialogue_ND
    assert plan.answers == answers  # nothing is matched twice
    assert torch.equal(ahead, victor.enter(visual, victor.plan(batch_of(), 0)).dialogue_ND)
    assert victor.matcher.waited > 0


def test_without_images_nothing_is_matched():
    victor = made()
    plan = victor.plan(batch_of((), ()), 0)
    entering = victor.enter(torch.zeros(0, WIDTH), plan)
    assert entering.dialogue_ND.shape == (0, WIDTH)
    assert plan.counts == {LOSS: 0}


REFUSED = {
    "share": (dict(replaced_share=1.5), "replaced_share=1.5 is not between 0 and 1"),
    "pool": (dict(pool_size=0), "pool_size=0 must be at least 1"),
    "beta": (dict(smooth_l1_beta=0.0), "smooth_l1_beta=0.0 must be positive"),
}


@pytest.mark.parametrize(("settings", "message"), REFUSED.values(), ids=REFUSED)
def test_senseless_settings(settings, message):
    config = recipe(**settings)
    with pytest.raises(ConfigError, match=message):
        config.objective.check(config)


def test_more_replaced_tokens_than_rows_are_refused():
    with pytest.raises(ConfigError, match="an image has 9 replaced tokens and pool_size is 8"):
        made(pool_size=8).plan(batch_of(), 0)


def test_a_text_model_is_refused():
    config = replace(recipe(), vision=VisionConfig(vision="none"))
    with pytest.raises(ConfigError, match="needs a visual path"):
        config.objective.check(config)
