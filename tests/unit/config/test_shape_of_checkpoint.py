"""A run that starts from a checkpoint has its shape; the 7B preset of the recipes is nobody's default then."""

import pytest

from laver_mcore.config.errors import ConfigError
from laver_mcore.config.load import parse, to_yaml
from laver_mcore.config.presets import model_name

DATA = ["--data-path", "none", "--tokenizer-model", "none", "--vision", "none"]
SHAPE = "--model tiny --family qwen3 --num-layers 6 --hidden-size 96 --kv-channels 32 --rotary-base 5e5"


@pytest.fixture
def folder(tmp_path):
    config, _ = parse([*DATA, *SHAPE.split(), "--save", str(tmp_path)])
    (tmp_path / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    return tmp_path


def test_the_shape_is_the_checkpoints(folder):
    model = parse([*DATA, "--pretrained-checkpoint", str(folder)])[0].model
    found = (model.family, model.num_layers, model.hidden_size, model.kv_channels, model.rotary_base)
    assert found == ("qwen3", 6, 96, 32, 5e5)
    assert model.ffn_hidden_size == 384  # tiny's, as the checkpoint was
    assert model.vocab_size is None  # the tokenizer's, not the 7B preset's
    assert model_name(model) == "qwen3 of 6 layers, 96 wide"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--num-layers 4", "num_layers=4, but {folder} has 6; leave num_layers out"),
        ("--hidden-size 64", "hidden_size=64, but {folder} has 96; leave hidden_size out"),
        ("--family llama", "family=llama, but {folder} has qwen3; leave family out"),
    ],
)
def test_another_shape_is_refused_before_anything_is_built(folder, flags, words):
    with pytest.raises(ConfigError) as refused:
        parse([*DATA, "--pretrained-checkpoint", str(folder), *flags.split()])
    assert str(refused.value) == words.format(folder=folder)


def test_the_same_shape_may_be_said(folder):
    parse([*DATA, "--pretrained-checkpoint", str(folder), "--num-layers", "6"])


def test_models_are_called_what_they_are():
    assert model_name(parse([*DATA, "--model", "qwen3-8b"])[0].model) == "qwen3-8b"
    cut = parse([*DATA, "--model", "qwen3-8b", "--num-layers", "2"])[0].model
    assert model_name(cut) == "qwen3 of 2 layers, 4096 wide"
