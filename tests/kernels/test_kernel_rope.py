"""The rotation: half-split pairs, band order of Qwen2-VL, text as 1D, and its inverse."""

from types import SimpleNamespace

import pytest
import torch

from laver_kernels import rope_table
from laver_kernels.mixed_attention.rope import rotate, scaled


def _positions(num_tokens=11):
    return torch.randint(0, 40, (3, num_tokens), generator=torch.Generator().manual_seed(0))


def test_text_is_one_dimensional_rope():
    place = torch.arange(50)
    want = torch.outer(place.float(), 1.0 / 1e6 ** (torch.arange(0, 64, 2).float() / 64))
    for section in (None, (8, 12, 12), (32, 0, 0)):
        for split in ("contiguous", "interleaved"):
            cos, sin = rope_table(place.expand(3, -1), 64, section=section, split=split)
            assert torch.equal(cos, want.cos())
            assert torch.equal(sin, want.sin())


@pytest.mark.parametrize("section", [(0, 16, 16), (8, 12, 12), (32, 0, 0), (1, 2, 29), None])
def test_frequency_reads_the_axis_of_its_band(section):
    """Without a section: rows in the first half of the frequencies, columns in the second, t nowhere."""
    positions = _positions()
    cos, _ = rope_table(positions, 64, base=1e4, section=section)
    section = section or (0, 16, 16)
    for frequency in range(32):
        axis = 0 if frequency < section[0] else 1 if frequency < section[0] + section[1] else 2
        want = (positions[axis].float() * (1.0 / 1e4 ** (torch.tensor(2.0 * frequency) / 64))).cos()
        torch.testing.assert_close(cos[:, frequency], want, rtol=0, atol=1e-6)


# Bands of (t, row, column) -> what each frequency reads when they take turns.
INTERLEAVED = {
    (0, 2, 2): "rcrc",
    (0, 3, 2): "rcrcr",
    (2, 2, 2): "trctrc",
    (4, 2, 2): "trctrctt",
    (1, 2, 3): "trcrcc",
    (3, 0, 0): "ttt",
}


@pytest.mark.parametrize(("section", "wanted"), INTERLEAVED.items(), ids=INTERLEAVED.values())
def test_interleaved_axes_take_turns(section, wanted):
    positions = _positions()
    cos, sin = rope_table(positions, 2 * sum(section), base=1e4, section=section, split="interleaved")
    for frequency, axis in enumerate(wanted):
        angle = positions["trc".index(axis)].double() * 1e4 ** (-frequency / sum(section))
        torch.testing.assert_close(cos[:, frequency].double(), angle.cos(), rtol=0, atol=1e-5)
        torch.testing.assert_close(sin[:, frequency].double(), angle.sin(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("section", [(24, 20, 20), (12, 10, 10), (4, 2, 2), (8, 8, 8)])
def test_interleaved_is_qwen3_vl(section):
    """transformers' module with its frequencies in fp64."""
    modeling = pytest.importorskip("transformers.models.qwen3_vl.modeling_qwen3_vl")
    head_dim = 2 * sum(section)
    parameters = {"rope_type": "default", "rope_theta": 5e6, "mrope_section": list(section)}
    config = SimpleNamespace(head_dim=head_dim, max_position_embeddings=64, rope_parameters=parameters)
    embedding = modeling.Qwen3VLTextRotaryEmbedding(config)
    positions = _positions()
    frequency_F = 5e6 ** -(torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    angle_3BTF = positions[:, None, :, None].double() * frequency_F
    wanted = [
        embedding.recomposition_frequencies(x)[0, :, : head_dim // 2]
        for x in (angle_3BTF.cos(), angle_3BTF.sin())
    ]
    found = rope_table(positions, head_dim, base=5e6, section=section, split="interleaved")
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("section", [(0, 16, 16), (8, 12, 12)])
def test_same_as_transformers(section):
    modeling = pytest.importorskip("transformers.models.qwen2_vl.modeling_qwen2_vl")
    positions = _positions()
    q, k = torch.randn(1, 4, 11, 64), torch.randn(1, 2, 11, 64)
    if hasattr(modeling, "apply_multimodal_rotary_pos_emb"):  # transformers 4
        angle = positions[:, None, :, None].float() / 1e6 ** (torch.arange(0, 64, 2).float() / 64)
        angle = torch.cat([angle, angle], -1)
        apply = modeling.apply_multimodal_rotary_pos_emb
        want_q, want_k = apply(q, k, angle.cos(), angle.sin(), list(section))
    else:
        parameters = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": list(section)}
        config = SimpleNamespace(head_dim=64, max_position_embeddings=64, rope_parameters=parameters)
        embedding = modeling.Qwen2VLRotaryEmbedding(config)
        want_q, want_k = modeling.apply_rotary_pos_emb(q, k, *embedding(q, positions[:, None]))
    table = rope_table(positions, 64, section=section)
    for x, want in ((q, want_q), (k, want_k)):
        torch.testing.assert_close(rotate(x[0].transpose(0, 1), *table), want[0].transpose(0, 1))


@pytest.mark.parametrize(
    "scaling", [(8.0, 1.0, 4.0, 8192), (32.0, 1.0, 4.0, 8192), (8.0, 1.0, 4.0, 64), (2.0, 0.5, 2.0, 16)]
)
def test_scaled_frequencies_are_those_of_transformers(scaling):
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    parameters = {"rope_type": "llama3", "rope_theta": 5e5, **dict(zip(names, scaling, strict=True))}
    config = LlamaConfig(hidden_size=128, num_attention_heads=1, head_dim=128, rope_parameters=parameters)
    wanted_F, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain_F = 1.0 / 5e5 ** (torch.arange(0, 128, 2).float() / 128)
    torch.testing.assert_close(scaled(plain_F, *scaling), wanted_F, rtol=1e-6, atol=0)
    assert 0 < int((wanted_F == plain_F).sum()) < 64
    one = torch.ones(3, 1, dtype=torch.int64)
    cos_TF, _ = rope_table(one, 128, 5e5, (0, 32, 32), scaling=scaling)
    torch.testing.assert_close(cos_TF[0], wanted_F.cos())


def test_inverse_after_forward_is_the_identity():
    x = torch.randn(11, 2, 64, dtype=torch.float64)
    cos, sin = rope_table(_positions(), 64)
    # fp32 cos and sin are a rotation up to 1e-7.
    torch.testing.assert_close(rotate(rotate(x, cos, sin), cos, sin, inverse=True), x, rtol=0, atol=1e-6)


def test_unknown_split():
    with pytest.raises(ValueError, match="split='woven', want one of contiguous, interleaved"):
        rope_table(_positions(), 64, split="woven")


@pytest.mark.parametrize(
    ("positions", "head_dim", "section", "words"),
    [
        (
            torch.zeros(3, 4, dtype=torch.int64),
            64,
            (8, 8, 8),
            "section=.8, 8, 8. for head_dim=64, want .* sum to 32",
        ),
        (torch.zeros(3, 4, dtype=torch.int64), 66, None, "head_dim=66 has no equal 2D split"),
        (torch.zeros(3, 4, dtype=torch.int64), 63, (10, 10, 11), "sum to 31.5"),
        (torch.zeros(2, 4, dtype=torch.int64), 64, None, r"positions_3T has shape \[2, 4\], want \[3, T\]"),
        (torch.zeros(3, 4, dtype=torch.bool), 64, None, "positions_3T is torch.bool"),
    ],
)
def test_bad_input(positions, head_dim, section, words):
    with pytest.raises(ValueError, match=words):
        rope_table(positions, head_dim, section=section)
