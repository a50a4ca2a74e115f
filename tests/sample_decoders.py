"""Small random decoders of every family, as transformers builds them: the head ratios of published models."""

import torch

LLAMA_3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
"""Llama 3.1's, for models that have learned 16 positions: bands that stay, that are slowed and that are in between."""
PLAIN_ROPE = {"rope_type": "default", "rope_theta": 1e4}

# Query and key heads, width of a head (where it is not width / heads), rotary positions, tied: as published.
FAMILIES = {
    "qwen2": dict(model_type="qwen2", heads=14, groups=2),
    "qwen2_tied": dict(model_type="qwen2", heads=8, groups=4, tied=True),
    "vicuna": dict(model_type="llama", heads=4, groups=4),
    "llama3": dict(model_type="llama", heads=8, groups=2),
    "llama3.1": dict(model_type="llama", heads=8, groups=2, rope=LLAMA_3_ROPE),
    "llama3.2_tied": dict(model_type="llama", heads=8, groups=2, rope=LLAMA_3_ROPE, tied=True),
    "qwen3": dict(model_type="qwen3", heads=8, groups=2, head_dim=12),
    "qwen3_tied": dict(model_type="qwen3", heads=4, groups=2, head_dim=16, tied=True),
}


def random_decoder(name: str, *, layers: int = 2, vocab_size: int = 101, std: float = 0.15, **changes):
    """The transformers model called `name` in the table, narrow; every weight random, norms and biases too."""
    from transformers import AutoConfig, AutoModelForCausalLM

    kind = FAMILIES[name]
    width = 8 * kind["heads"]
    torch.manual_seed(0)
    settings = dict(
        model_type=kind["model_type"],
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=kind["heads"],
        num_key_value_heads=kind["groups"],
        head_dim=kind.get("head_dim", 8),
        intermediate_size=96,
        vocab_size=vocab_size,
        tie_word_embeddings=kind.get("tied", False),
        rope_parameters=dict(kind.get("rope", PLAIN_ROPE)),
        rms_norm_eps=1e-5,
        initializer_range=std,
        bos_token_id=None,
        eos_token_id=None,
    )
    config = AutoConfig.for_model(**settings | changes)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith("bias") or "norm" in parameter_name:
                parameter.add_(torch.randn_like(parameter) * 0.2)  # zeros and ones would hide a mistake
    return model
