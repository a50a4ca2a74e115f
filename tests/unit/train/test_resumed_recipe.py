"""Which recipes go on with a run, and which are told in what they differ."""

import pytest
import yaml

from laver_mcore.cli.run import first_difference
from laver_mcore.config.load import to_yaml
from laver_mcore.config.schema import Config
from laver_mcore.objectives.laver import LaverConfig

CASES = {
    "nothing": ({}, {}, None),
    "layout": ({}, {"parallel": {"tensor_model_parallel_size": 4}}, None),
    "learning rate": ({}, {"optimizer": {"lr": 3.0}}, "optimizer.lr was 2e-05, now 3.0"),
    "newer key, by default": ({"laver": {"centering": ...}}, {}, None),
    "newer key, used": (
        {"laver": {"centering": ...}},
        {"laver": {"centering": True}},
        "laver.centering was False, now True",
    ),
    "newer section": ({"laver": ...}, {}, None),
    "what the objective lets change": ({}, {"laver": {"teacher_precision": "fp8"}}, None),
    "another objective": ({"objective": "lm"}, {}, "objective was 'lm', now 'laver'"),
}


def changed(changes):
    """The default recipe with these values; `...` leaves a key or a section out."""
    recipe = yaml.safe_load(to_yaml(Config(objective=LaverConfig())))
    for section, values in changes.items():
        if values is ...:
            del recipe[section]
            continue
        if isinstance(values, str):
            recipe[section] = values
            continue
        recipe[section] |= values
        recipe[section] = {key: value for key, value in recipe[section].items() if value is not ...}
    return recipe


@pytest.mark.parametrize("name", CASES)
def test_first_difference(name):
    old, new, expected = CASES[name]
    assert first_difference(changed(old), changed(new)) == expected
