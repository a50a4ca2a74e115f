import pytest
import torch

from laver_mcore.config.presets import PRESETS, fill_from_preset
from laver_mcore.config.schema import ModelConfig
from laver_mcore.convert.names import (
    OUTPUT,
    canonical,
    checkpoint_key,
    entries,
    fuse,
    our_shape,
    pad_vocabulary,
    split,
    their_shapes,
)
from laver_mcore.model.sharding import shard

QWEN = [name for name in PRESETS if name.startswith("qwen")]


def small(preset: str) -> ModelConfig:
    """The preset's head ratio and tying, with two narrow layers."""
    heads, groups = PRESETS[preset]["num_attention_heads"], PRESETS[preset]["num_query_groups"]
    return fill_from_preset(
        ModelConfig(
            model=preset, num_layers=2, hidden_size=4 * heads, ffn_hidden_size=24, num_query_groups=groups
        )
    )


@pytest.mark.parametrize("preset", QWEN)
def test_fuse_and_split_are_inverse(preset):
    config = small(preset)
    for entry in entries(config):
        theirs = [torch.randn(shape) for shape in their_shapes(entry, config, 50)]
        ours = fuse(entry, theirs, config)
        assert tuple(ours.shape) == our_shape(entry, config, 50)
        for back, tensor in zip(split(entry, ours, config), theirs, strict=True):
            assert torch.equal(back, tensor)


@pytest.mark.parametrize("preset", QWEN)
def test_queries_lie_beside_their_keys_and_values(preset):
    config = small(preset)
    entry = next(e for e in entries(config) if e.fusion == "qkv")
    groups, per_group = config.num_query_groups, config.num_attention_heads // config.num_query_groups
    heads = [(name, i) for i in range(groups) for name in ["q"] * per_group + ["k", "v"]]
    rows = {"q": iter(range(config.num_attention_heads)), "k": iter(range(groups)), "v": iter(range(groups))}
    base = {"q": 0, "k": 1000, "v": 2000}
    theirs = [
        (base[kind] + torch.arange(count)).repeat_interleave(config.kv_channels)[:, None].float()
        for kind, count in (("q", config.num_attention_heads), ("k", groups), ("v", groups))
    ]
    wanted = [base[kind] + next(rows[kind]) for kind, _ in heads]
    assert fuse(entry, theirs, config)[:: config.kv_channels, 0].tolist() == wanted


@pytest.mark.parametrize("preset", QWEN)
def test_names_match_transformers(preset):
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = small(preset)
    hf = Qwen2Config(
        num_hidden_layers=2,
        hidden_size=config.hidden_size,
        intermediate_size=24,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_query_groups,
        vocab_size=50,
        tie_word_embeddings=not config.untie_embeddings_and_output_weights,
    )
    with torch.device("meta"):
        model = Qwen2ForCausalLM(hf)
    wanted = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    table = entries(config)
    found = {
        name: shape
        for entry in table
        for name, shape in zip(entry.theirs, their_shapes(entry, config, 50), strict=True)
    }
    assert found == wanted
    assert any(entry.ours == OUTPUT for entry in table) == config.untie_embeddings_and_output_weights


def test_transformer_engine_names_are_the_same_weights():
    config = small("qwen2.5-7b")
    assert canonical("a.layers.1.mlp.linear_fc1.layer_norm_weight") == "a.layers.1.pre_mlp_layernorm.weight"
    keys = {checkpoint_key(entry) for entry in entries(config) if entry.layer == 1}
    assert "language_model.decoder.layers.self_attention.linear_qkv.layer_norm_weight" in keys
    assert len(keys) == 7


@pytest.mark.parametrize("name", ["mlp.linear_fc1.weight", "mlp.linear_fc2.weight"])
def test_shards_are_slices_of_gate_and_up(name):
    full = torch.arange(16.0).reshape(8, 2)
    parts = [shard(full, name, 0, rank, 2) for rank in range(2)]
    rows = [part[:, 0].div(2).int().tolist() for part in parts]
    assert rows == ([[0, 1, 4, 5], [2, 3, 6, 7]] if "fc1" in name else [[0, 1, 2, 3], [4, 5, 6, 7]])


def test_vocabulary_padding_is_zero_and_refuses_to_cut():
    assert pad_vocabulary(torch.ones(3, 2), 5)[3:].abs().sum() == 0
    with pytest.raises(ValueError, match="3 tokens does not fit into 2 rows"):
        pad_vocabulary(torch.ones(3, 2), 2)
