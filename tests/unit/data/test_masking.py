"""The mask draw: exact counts, and a function of (seed, key, image, step) alone."""

import math
from types import SimpleNamespace

import numpy as np
import pytest

from laver_mcore.data.sequence.masking import draw_mask

NAMES = {"seed": 1, "key": "a", "step": 5, "image_index": 0}


@pytest.mark.parametrize(
    ("num_tokens", "ratio"),
    [(729, 0.05), (729, 0.0), (729, 1.0), (1, 0.05), (1, 1.0), (20, 0.05), (576, 0.031), (0, 0.5)],
)
def test_permutation_masks_exactly_the_floor(num_tokens, ratio):
    mask = draw_mask(num_tokens, ratio, **NAMES)
    assert mask.shape == (num_tokens,)
    assert mask.dtype == bool
    assert mask.sum() == math.floor(ratio * num_tokens)


@pytest.mark.parametrize("strategy", ["permutation", "bernoulli"])
def test_every_name_changes_the_draw_and_nothing_else_does(strategy):
    def draw(**changes):
        return draw_mask(400, 0.5, strategy=strategy, **(NAMES | changes))

    first = draw()
    np.random.seed(3)  # noqa: NPY002 (global state must not matter)
    assert np.array_equal(draw(), first)
    assert np.array_equal(draw(step=np.int64(5)), first)
    for change in ({"seed": 2}, {"key": "b"}, {"step": 6}, {"image_index": 1}):
        assert not np.array_equal(draw(**change), first), change


def test_draws_do_not_change_with_the_machine_or_the_numpy_release():
    """A resumed run must see the masks that it would have seen."""
    assert np.flatnonzero(draw_mask(12, 0.25, **NAMES)).tolist() == [1, 3, 7]
    assert np.flatnonzero(draw_mask(12, 0.25, strategy="bernoulli", **NAMES)).tolist() == [1]


@pytest.mark.parametrize("strategy", ["permutation", "bernoulli"])
def test_a_larger_ratio_masks_a_superset(strategy):
    small, large = (draw_mask(300, ratio, strategy=strategy, **NAMES) for ratio in (0.2, 0.6))
    assert (large | ~small).all()
    assert large.sum() > small.sum()


@pytest.mark.parametrize("strategy", ["permutation", "bernoulli"])
def test_tokens_are_masked_equally_often(strategy):
    counts = sum(
        draw_mask(16, 0.25, strategy=strategy, **(NAMES | {"step": step})).astype(int) for step in range(2000)
    )
    assert np.abs(counts / 2000 - 0.25).max() < 0.04  # four standard deviations


@pytest.mark.parametrize(
    ("ratio", "strategy", "message"),
    [(1.5, "permutation", r"1.5; it must lie in \[0, 1\]"), (0.5, "random", "'random'; use")],
)
def test_bad_arguments(ratio, strategy, message):
    with pytest.raises(ValueError, match=message):
        draw_mask(4, ratio, strategy=strategy, **NAMES)


def test_a_step_draws_from_its_own_number_and_each_images_own_names():
    """Which arguments a step gives: those of the image, in the order of the batch."""
    from laver_mcore.config.schema import Config, TrainConfig
    from laver_mcore.objectives.laver import LaverConfig
    from laver_mcore.objectives.objective import image_masks, joined

    settings = LaverConfig(mask_draw="permutation", mask_ratio=0.3, mask_strategy="constant")
    config = Config(objective=settings, train=TrainConfig(seed=11, train_iters=7))
    batch = SimpleNamespace(image_grids=((4, 5), (3, 7), (4, 5)), image_keys=(("a", 0), ("a", 1), ("b", 0)))
    found = joined(image_masks(config, batch, 6))
    expected = [
        draw_mask(20, 0.3, seed=11, key="a", step=6, image_index=0),
        draw_mask(21, 0.3, seed=11, key="a", step=6, image_index=1),
        draw_mask(20, 0.3, seed=11, key="b", step=6, image_index=0),
    ]
    assert np.array_equal(found, np.concatenate(expected))
    assert [mask.sum() for mask in np.split(found, [20, 41])] == [6, 6, 6]  # floor(0.3 N) each
