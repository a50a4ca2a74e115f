"""An exported model on the kernels' attention: prefill and every token after it, as with sdpa's dense mask."""

import torch

from laver_kernels.transformers_attention import register
from laver_mcore.convert.hub.configuration_laver import LaverConfig
from laver_mcore.convert.hub.modeling_laver import LaverForConditionalGeneration

IMAGE_TOKEN = 9
TEXT = {
    "model_type": "qwen2", "vocab_size": 20, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 12,
}  # fmt: skip


def test_generation_of_an_exported_model_with_a_cache():
    register()
    config = LaverConfig(
        text_config=TEXT, patch_size=2, connector_hidden_size=16, image_grid=None, image_token_id=IMAGE_TOKEN,
        mrope_section=(0, 3, 3),
    )  # fmt: skip
    torch.manual_seed(0)
    dense = LaverForConditionalGeneration._from_config(config, attn_implementation="sdpa").eval()
    ours = LaverForConditionalGeneration._from_config(config, attn_implementation="laver").eval()
    ours.load_state_dict(dense.state_dict())
    assert ours.model.config._attn_implementation == "laver"
    # A 2 x 3 image in the first sequence; the second is padded on the left.
    inputs = {
        "input_ids": torch.tensor([[1, *[IMAGE_TOKEN] * 6, 3, 4], [0, 0, 5, 6, *[IMAGE_TOKEN] * 2, 7, 8, 2]]),
        "attention_mask": torch.tensor([[1] * 9, [0] * 2 + [1] * 7]),
        "pixel_values": torch.randn(8, 12),
        "image_grids": torch.tensor([[2, 3], [1, 2]]),
    }
    options = {
        "max_new_tokens": 6,
        "do_sample": False,
        "output_logits": True,
        "return_dict_in_generate": True,
    }
    want, got = (model.generate(**inputs, **options, pad_token_id=0) for model in (dense, ours))
    assert torch.equal(got.sequences, want.sequences)
    torch.testing.assert_close(torch.stack(got.logits), torch.stack(want.logits), rtol=1e-4, atol=1e-5)
