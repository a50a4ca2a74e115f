"""Learning rates by name pattern: what is read, what each parameter gets, and what the optimizer makes of it."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from laver_mcore.config.errors import ConfigError
from laver_mcore.config.schema import Config, ModelConfig, OptimizerConfig
from laver_mcore.model.parameters import Training, freeze_local, merge_parts, training_of
from laver_mcore.objectives.victor import VictorConfig

TOPOLOGY = SimpleNamespace(tp_rank=0, tp_size=1)


class Chunk(torch.nn.Module):
    """Two parts of a model, and what `named_parameters` asks of one."""

    def __init__(self):
        super().__init__()
        self.connector, self.token_pool = torch.nn.Linear(2, 2), torch.nn.Parameter(torch.zeros(4, 2))
        self.share_embeddings_and_output_weights = False

    @property
    def decoder(self):
        return SimpleNamespace(layers=[])


# --lr-mult -> factor of connector.weight, connector.bias, token_pool.
RATES = {
    "none": ((), (1.0, 1.0, 1.0)),
    "one": (("connector.*=10",), (10.0, 10.0, 1.0)),
    "last_wins": (("*=2", "connector.*=10", "*.bias=3"), (10.0, 3.0, 2.0)),
    "fraction": (("token_pool=0.2",), (1.0, 1.0, 0.2)),
}


def config_of(*rates):
    config = Config(model=ModelConfig(hidden_size=2), objective=VictorConfig())
    return replace(config, optimizer=OptimizerConfig(lr_mult=rates))


@pytest.mark.parametrize(("rates", "wanted"), RATES.values(), ids=RATES)
def test_factors_by_name(rates, wanted):
    training, chunk = training_of(config_of(*rates)), Chunk()
    _, table = freeze_local([chunk], training, TOPOLOGY)
    found = [getattr(p, "lr_mult", 1.0) for p in (*chunk.connector.parameters(), chunk.token_pool)]
    assert found == list(wanted)
    assert chunk.token_pool.wd_mult == 0.0  # the objective's own wish
    assert not hasattr(chunk.connector.weight, "wd_mult")
    labels = [name for name, _, _ in table]
    assert ("token_pool (lr x 0.2)" in labels) == ("token_pool=0.2" in rates)
    assert sum(total for _, total, _ in table) == 14


@pytest.mark.parametrize(
    "rate",
    ["connector.*", "connector.*=", "=2", "connector.*=fast", "connector.*=0", "a=-1", "a=inf", "a=nan"],
)
def test_what_is_no_rate_is_named(rate):
    with pytest.raises(ConfigError, match="is no PATTERN=FACTOR"):
        training_of(config_of(rate))


def test_a_pattern_without_parameters_is_named():
    training = Training(trainable=("*",), rates=(("conector.*", 2.0),))
    with pytest.raises(
        ConfigError, match=r"lr_mult pattern 'conector.\*' matches no parameter; nearest is 'connector"
    ):
        merge_parts([(["connector.weight", "token_pool"], [])], training)
