"""`attn_implementation="laver"`: transformers' own models, against its sdpa with the dense mask."""

import copy

import pytest
import torch

transformers = pytest.importorskip("transformers")
from transformers.masking_utils import create_causal_mask, sliding_window_causal_mask_function  # noqa: E402

from laver_kernels.transformers_attention import intervals_mask, register  # noqa: E402

SHAPE = {
    "vocab_size": 50, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128,
}  # fmt: skip
# The second sequence is padded on the left; images of the two at different places, two of them adjacent.
PADDING = torch.tensor([[1] * 12, [0] * 3 + [1] * 9])
IMAGES = torch.tensor([[-1, 0, 0, 0, 1, 1, -1, -1, 2, 2, 2, -1], [-1] * 4 + [3] * 6 + [-1] * 2])


@pytest.fixture(scope="module", autouse=True)
def registered():
    register()
    register("laver triton", impl="triton")


def pair(family, name):
    """One model twice: with sdpa, and with ours."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**SHAPE, head_dim=16)
    dense = (
        getattr(transformers, f"{family}ForCausalLM")._from_config(config, attn_implementation="sdpa").eval()
    )
    ours = copy.deepcopy(dense)
    ours.set_attn_implementation(name)
    return dense, ours


def masks(dense, ours, ids, **what):
    """The same mask by both interfaces, as each model makes it for itself."""
    embeds = torch.zeros(*ids.shape, 1)
    return [
        create_causal_mask(
            config=model.config, inputs_embeds=embeds, past_key_values=None, position_ids=None, **what
        )
        for model in (dense, ours)
    ]


def loss_and_gradients(model, ids, mask, weight):
    if model.config.model_type == "qwen2":
        mask = {"full_attention": mask}
    logits = model(input_ids=ids, attention_mask=mask).logits
    loss = (logits.float().log_softmax(-1) * weight).sum()
    model.zero_grad()
    loss.backward()
    return [logits.detach(), *(p.grad for p in model.parameters())]


@pytest.mark.parametrize("name", ["laver", "laver triton"])
@pytest.mark.parametrize("family", ["Qwen2", "Llama"])
def test_image_blocks_forward_and_backward(family, name, monkeypatch):
    if name == "laver triton":
        pytest.importorskip("triton")
    dense, ours = pair(family, name)
    ids = torch.randint(0, 50, PADDING.shape, generator=torch.Generator().manual_seed(1))
    what = {"attention_mask": PADDING, "block_sequence_ids": IMAGES}
    dense_mask, intervals = masks(dense, ours, ids, **what)
    if family == "Llama":  # takes a prepared mask as a tensor alone: ours reads its intervals, once
        intervals = dense_mask.clone()
    weight = torch.randn(2, 12, 50) * PADDING[..., None]
    with_dense = loss_and_gradients(dense, ids, dense_mask, weight)
    with_ours = loss_and_gradients(ours, ids, intervals, weight)
    real = PADDING.bool()
    torch.testing.assert_close(with_ours[0][real], with_dense[0][real], rtol=1e-4, atol=1e-5)
    for got, want in zip(with_ours[1:], with_dense[1:], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("family", ["Qwen2", "Llama"])
def test_generation_with_a_cache(family):
    dense, ours = pair(family, "laver")
    ids = torch.randint(0, 50, PADDING.shape, generator=torch.Generator().manual_seed(2))
    keywords = {"attention_mask": PADDING, "max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    keywords |= {"output_logits": True, "return_dict_in_generate": True, "use_cache": True}
    want, got = (model.generate(ids, **keywords) for model in (dense, ours))
    assert torch.equal(got.sequences, want.sequences)
    torch.testing.assert_close(torch.stack(got.logits), torch.stack(want.logits), rtol=1e-4, atol=1e-5)


def test_packed_sequences_by_their_positions():
    dense, ours = pair("Qwen2", "laver")
    ids = torch.randint(0, 50, (1, 12), generator=torch.Generator().manual_seed(3))
    positions = torch.tensor([[*range(5), *range(7)]])
    want, got = (
        model(input_ids=ids, position_ids=positions, use_cache=False).logits for model in (dense, ours)
    )
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("step", [1, 5, 2**24])
def test_sliding_windows_on_a_cache_a_few_rows_at_a_time(step, monkeypatch):
    from transformers.masking_utils import sdpa_mask

    monkeypatch.setattr("laver_kernels.transformers_attention.CHUNK_ELEMENTS", 2 * 12 * step)
    what = {
        "batch_size": 2, "q_length": 7, "kv_length": 12, "q_offset": 5, "attention_mask": PADDING.bool(),
        "mask_function": sliding_window_causal_mask_function(4),
    }  # fmt: skip
    want = sdpa_mask(**what)[:, 0]
    mask = intervals_mask(**what)
    key = torch.arange(24)
    sees = (key >= mask.row_lo_T[:, None]) & (key < mask.row_hi_T[:, None])
    assert torch.equal(torch.stack([sees[:7, :12], sees[7:, 12:]]), want)
    assert not sees[:7, 12:].any() and not sees[7:, :12].any()
    mask.validate()


def test_what_it_refuses():
    hole = PADDING.clone()
    hole[0, 5] = 0
    with pytest.raises(ValueError, match="row 6 of sequence 0 sees keys that are no interval"):
        intervals_mask(batch_size=2, q_length=12, kv_length=12, attention_mask=hole.bool())
    _, ours = pair("Llama", "laver")
    ours.config.attention_dropout = 0.1
    for layer in ours.model.layers:
        layer.self_attn.attention_dropout = 0.1
    with pytest.raises(ValueError, match="laver attention computes no dropout"):
        ours.train()(input_ids=torch.zeros(1, 3, dtype=torch.long))
