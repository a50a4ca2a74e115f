"""The table of names: shapes, order of heads, and a decoder that computes what transformers computes."""

import pytest
import torch
from torch.nn.functional import linear, rms_norm, silu

from laver_mcore.config.decoders import family_named
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
    with_new_rows,
)
from laver_mcore.model.sharding import shard

DECODERS = [name for name in PRESETS if name != "tiny"]


def small(preset: str) -> ModelConfig:
    """The preset's head ratio and tying, with two narrow layers."""
    heads, groups = PRESETS[preset]["num_attention_heads"], PRESETS[preset]["num_query_groups"]
    return fill_from_preset(
        ModelConfig(
            model=preset,
            num_layers=2,
            hidden_size=4 * heads,
            ffn_hidden_size=24,
            num_query_groups=groups,
            kv_channels=6 if "kv_channels" in PRESETS[preset] else None,
        )
    )


@pytest.mark.parametrize("preset", DECODERS)
def test_fuse_and_split_are_inverse(preset):
    config = small(preset)
    for entry in entries(config):
        theirs = [torch.randn(shape) for shape in their_shapes(entry, config, 50)]
        ours = fuse(entry, theirs, config)
        assert tuple(ours.shape) == our_shape(entry, config, 50)
        for back, tensor in zip(split(entry, ours, config), theirs, strict=True):
            assert torch.equal(back, tensor)


@pytest.mark.parametrize("preset", DECODERS)
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


@pytest.mark.parametrize("preset", DECODERS)
def test_names_match_transformers(preset):
    from transformers import AutoConfig, AutoModelForCausalLM

    config = small(preset)
    hf = AutoConfig.for_model(
        family_named(config.family).model_type,
        num_hidden_layers=2,
        hidden_size=config.hidden_size,
        intermediate_size=24,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_query_groups,
        head_dim=config.kv_channels,
        vocab_size=50,
        tie_word_embeddings=not config.untie_embeddings_and_output_weights,
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(hf)
    wanted = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    table = entries(config)
    found = {
        name: shape
        for entry in table
        for name, shape in zip(entry.theirs, their_shapes(entry, config, 50), strict=True)
    }
    assert found == wanted
    assert any(entry.ours == OUTPUT for entry in table) == config.untie_embeddings_and_output_weights


def forward(weights, config, ids_T, base=1e4, epsilon=1e-6):
    """Logits of one document, in plain PyTorch from Megatron's fused weights.

    A group's rows of linear_qkv are its queries, its key, its value; linear_fc1 is gate above up.
    """
    groups, channels = config.num_query_groups, config.kv_channels
    per_group = config.num_attention_heads // groups
    length = len(ids_T)
    angle_TF = torch.arange(length)[:, None] * base ** -(torch.arange(0, channels, 2).double() / channels)
    cos, sin = (torch.cat([f(angle_TF)] * 2, -1)[:, None] for f in (torch.cos, torch.sin))

    def rotated(x_THC):
        first, second = x_THC.chunk(2, -1)
        return x_THC * cos + torch.cat([-second, first], -1) * sin

    x_TD = weights["language_model.embedding.word_embeddings.weight"][ids_T]
    for layer in range(config.num_layers):
        w = {
            name.removeprefix(f"language_model.decoder.layers.{layer}."): weight
            for name, weight in weights.items()
        }
        normed = rms_norm(x_TD, x_TD.shape[-1:], w["input_layernorm.weight"], epsilon)
        fused = linear(normed, w["self_attention.linear_qkv.weight"], w["self_attention.linear_qkv.bias"])
        q, k, v = fused.view(length, groups, per_group + 2, channels).split([per_group, 1, 1], 2)
        q, k, v = rotated(q.flatten(1, 2)), rotated(k.squeeze(2)), v.squeeze(2)
        k, v = (x.repeat_interleave(per_group, 1) for x in (k, v))
        scores_HTT = torch.einsum("ihc,jhc->hij", q, k) / channels**0.5
        future = torch.ones(length, length, dtype=torch.bool).triu(1)
        p_HTT = scores_HTT.masked_fill(future, -torch.inf).softmax(-1)
        attended = torch.einsum("hij,jhc->ihc", p_HTT, v).flatten(1)
        x_TD = x_TD + linear(attended, w["self_attention.linear_proj.weight"])
        normed = rms_norm(x_TD, x_TD.shape[-1:], w["pre_mlp_layernorm.weight"], epsilon)
        gate, up = linear(normed, w["mlp.linear_fc1.weight"]).chunk(2, -1)
        x_TD = x_TD + linear(silu(gate) * up, w["mlp.linear_fc2.weight"])
    normed = rms_norm(
        x_TD, x_TD.shape[-1:], weights["language_model.decoder.final_layernorm.weight"], epsilon
    )
    head = "language_model.output_layer.weight"
    tied = weights["language_model.embedding.word_embeddings.weight"]
    return linear(normed, weights.get(head, tied))


@pytest.mark.parametrize("preset", ["qwen2.5-0.5b", "qwen2.5-7b"])
def test_fused_weights_compute_what_transformers_computes(preset):
    """In fp64, where a weight in another's place cannot hide: of equal shape are k and v, gate and up, the norms."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = small(preset)
    hf = Qwen2Config(
        num_hidden_layers=2,
        hidden_size=config.hidden_size,
        intermediate_size=24,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_query_groups,
        vocab_size=50,
        rms_norm_eps=1e-6,
        tie_word_embeddings=not config.untie_embeddings_and_output_weights,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
        attn_implementation="eager",
    )
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(hf).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn_like(parameter))
    theirs, ids_T = dict(model.named_parameters()), torch.arange(3, 40, 3)
    ours = {e.ours: fuse(e, [theirs[name] for name in e.theirs], config) for e in entries(config)}
    with torch.no_grad():
        wanted, got = model(ids_T[None]).logits[0], forward(ours, config, ids_T)
    assert wanted.std() > 0.1
    # transformers keeps the rotary table in fp32: angles up to 12 err by 1e-6.
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


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


def test_new_rows_are_the_mean_of_the_old_ones():
    old = torch.randn(7, 3).bfloat16()
    grown = with_new_rows(old, 9)
    assert torch.equal(grown[:7], old)
    for row in grown[7:]:
        assert torch.equal(row, old.float().mean(0).bfloat16())
    assert with_new_rows(old, 7) is old
