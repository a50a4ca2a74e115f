"""Schedules against the formulas of the LaVer paper, written out a second time and by hand."""

from math import cos, floor, pi
from types import SimpleNamespace

import pytest
import torch

from laver_mcore.config.schema import Config, ModelConfig, OptimizerConfig, TrainConfig
from laver_mcore.objectives.laver import Laver, LaverConfig
from laver_mcore.objectives.objective import LanguageModel
from laver_mcore.objectives.schedules import mask_ratio, momentum
from laver_mcore.train.schedules import learning_rate

TOTAL = 1000

# Strategy, final ratio r, iteration of 1000 -> mask ratio.
MASK_RATIOS = {
    "cosine_start": ("cosine", 0.05, 0, 0.0),
    "cosine_eighth": ("cosine", 0.05, 125, 0.05 * (1 - cos(pi / 8)) / 2),
    "cosine_third": ("cosine", 0.3, 333, 0.3 * (1 - cos(pi * 0.333)) / 2),
    "cosine_half": ("cosine", 0.05, 500, 0.025),
    "cosine_last": ("cosine", 0.05, 999, 0.05 * (1 - cos(pi * 0.999)) / 2),
    "constant_start": ("constant", 0.05, 0, 0.0),
    "constant_before_the_eighth": ("constant", 0.05, 124, 0.0),
    "constant_at_the_eighth": ("constant", 0.05, 125, 0.05),
    "constant_last": ("constant", 0.05, 999, 0.05),
}

# Strategy, initial momentum m, iteration of 1000 -> momentum.
MOMENTA = {
    "cosine_start": ("cosine", 0.95, 0, 0.95),
    "cosine_quarter": ("cosine", 0.95, 250, 1 - 0.05 * (1 + cos(pi / 4)) / 2),
    "cosine_half": ("cosine", 0.95, 500, 0.975),
    "cosine_half_of_another": ("cosine", 0.999, 500, 0.9995),
    "cosine_end": ("cosine", 0.95, 1000, 1.0),
    "constant_start": ("constant", 0.9, 0, 0.9),
    "constant_end": ("constant", 0.9, 999, 0.9),
}

# Style, warm-up iterations, minimum, iteration of 1000 -> learning rate; the peak is 2.
LEARNING_RATES = {
    "first_warm_up_step": ("cosine", 100, 0.0, 0, 2.0 * 1 / 100),
    "middle_of_the_warm_up": ("cosine", 100, 0.0, 49, 2.0 * 50 / 100),
    "last_warm_up_step": ("cosine", 100, 0.0, 99, 2.0),
    "cosine_peak": ("cosine", 100, 0.0, 100, 2.0),
    "cosine_half": ("cosine", 100, 0.0, 550, 1.0),
    "cosine_quarter_to_a_minimum": ("cosine", 0, 0.5, 250, 0.5 + 1.5 * (1 + cos(pi / 4)) / 2),
    "cosine_end": ("cosine", 100, 0.5, 1000, 0.5),
    "cosine_beyond_the_end": ("cosine", 100, 0.5, 1200, 0.5),
    "linear_peak": ("linear", 200, 0.0, 200, 2.0),
    "linear_half": ("linear", 200, 0.0, 600, 1.0),
    "linear_to_a_minimum": ("linear", 0, 1.0, 750, 1.25),
    "constant_warm_up": ("constant", 10, 0.0, 4, 1.0),
    "constant": ("constant", 10, 0.0, 999, 2.0),
    "no_warm_up": ("cosine", 0, 0.0, 0, 2.0),
    "nothing_but_warm_up": ("cosine", 1000, 0.0, 1000, 2.0),
}

# Iterations of the run, ema_ratio, ema_steps -> iterations between two moves.
EMA_STEPS = {
    "paper": (6250, 0.02, None, 125),
    "rounds_down": (99, 0.02, None, 1),
    "short_run": (10, 0.02, None, 1),
    "none_of_the_run": (1000, 0.0, None, 1),
    "explicit_wins": (6250, 0.02, 7, 7),
}


@pytest.mark.parametrize(("strategy", "ratio", "iteration", "wanted"), MASK_RATIOS.values(), ids=MASK_RATIOS)
def test_mask_ratio(strategy, ratio, iteration, wanted):
    assert mask_ratio(ratio, strategy, iteration, TOTAL) == pytest.approx(wanted, rel=1e-12, abs=1e-15)


@pytest.mark.parametrize(("strategy", "start", "iteration", "wanted"), MOMENTA.values(), ids=MOMENTA)
def test_momentum(strategy, start, iteration, wanted):
    assert momentum(start, strategy, iteration, TOTAL) == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize(
    ("style", "warmup", "minimum", "iteration", "wanted"), LEARNING_RATES.values(), ids=LEARNING_RATES
)
def test_learning_rate(style, warmup, minimum, iteration, wanted):
    config = OptimizerConfig(lr=2.0, min_lr=minimum, lr_decay_style=style, lr_warmup_iters=warmup)
    assert learning_rate(config, iteration, TOTAL) == pytest.approx(wanted, rel=1e-12, abs=1e-15)


@pytest.mark.parametrize(("total", "ratio", "steps", "wanted"), EMA_STEPS.values(), ids=EMA_STEPS)
def test_ema_steps(total, ratio, steps, wanted):
    config = Config(
        objective=LaverConfig(ema_ratio=ratio, ema_steps=steps), train=TrainConfig(train_iters=total)
    )
    assert config.objective.teacher(config).moves_every == wanted


class Still:
    """A teacher that notes the momentum of its moves."""

    def __init__(self):
        self.moves = []

    def update(self, master_shard, momentum):
        self.moves.append(float(momentum))
        return torch.tensor(1.0)


def laver_of(config):
    topology = SimpleNamespace(device=torch.device("cpu"), on_last_stage=True)
    return Laver(config, topology, Still())


def test_teacher_moves_after_every_third_step():
    config = Config(
        model=ModelConfig(hidden_size=8),
        objective=LaverConfig(ema_steps=3, momentum=0.9),
        train=TrainConfig(train_iters=10),
    )
    laver = laver_of(config)
    moves = [laver.after_step(torch.tensor(True), iteration, None) for iteration in range(10)]
    assert [iteration + 1 for iteration, move in enumerate(moves) if move] == [3, 6, 9]
    wanted = [1 - 0.05 * (1 + cos(pi * iteration / 10)) for iteration in (2, 5, 8)]
    assert laver.teacher.moves == pytest.approx(wanted)
    assert [move.momentum for move in moves if move] == pytest.approx(wanted)
    laver.after_step(torch.tensor(False), 2, None)
    assert laver.teacher.moves[-1] == 1.0  # a step that was not applied leaves the averages as they are


def test_without_laver_nothing_is_masked_and_there_is_no_teacher():
    config = Config(train=TrainConfig(train_iters=10))
    assert config.objective.mask(config, 9, key="a", image_index=0, iteration=9) is None
    assert config.objective.teacher(config) is None
    assert LanguageModel().settings(9) == {}


def test_settings_are_the_schedules():
    """What is logged and what is masked: every setting from its own schedule, over the whole run."""
    config = Config(
        model=ModelConfig(hidden_size=8),
        objective=LaverConfig(mask_ratio=0.2, momentum=0.9),
        train=TrainConfig(train_iters=40),
    )
    laver = laver_of(config)
    for iteration in range(40):
        settings, ratio = laver.settings(iteration), 0.1 * (1 - cos(pi * iteration / 40))
        assert settings["mask_ratio"] == pytest.approx(ratio)
        assert settings["momentum"] == pytest.approx(1 - 0.05 * (1 + cos(pi * iteration / 40)))
        mask = config.objective.mask(config, 1000, key="a", image_index=0, iteration=iteration)
        assert mask.sum() == floor(1000 * settings["mask_ratio"])


RUN = "tokens, on average over the run, the first at iteration "
NEVER = "warning: no visual token is ever masked"
# Tokens of an image, ratio, strategy, iterations -> what is said at the start. The first is LaVer's own recipe:
# floor(0.05 x 729) = 36 tokens at the end, 17.75 over the run, none before t = 663, which is the 664th.
REMARKS = {
    "paper": (729, 0.05, "cosine", 6250, f"masked: 17.75 of an image's 729 {RUN}664 of 6,250"),
    "constant": (100, 0.1, "constant", 80, f"masked: 8.75 of an image's 100 {RUN}11 of 80"),
    "never": (
        16,
        0.05,
        "cosine",
        100,
        f"{NEVER}, for floor(0.05 x 16) is 0 at every iteration; raise mask_ratio",
    ),
}


@pytest.mark.parametrize(("tokens", "ratio", "strategy", "total", "wanted"), REMARKS.values(), ids=REMARKS)
def test_a_run_says_how_much_it_will_mask(tokens, ratio, strategy, total, wanted):
    settings = LaverConfig(mask_ratio=ratio, mask_strategy=strategy)
    config = Config(objective=settings, train=TrainConfig(train_iters=total))
    assert settings.remarks(config, tokens) == (wanted,)
    assert Config().objective.remarks(config, tokens) == ()
