"""What a dialogue costs in a recipe's model: the shapes that `data.cost` weighs text and images by."""

from fnmatch import fnmatchcase

from laver_mcore.config.schema import Config
from laver_mcore.data.cost import PackingCost, TransformerShape, packing_cost
from laver_mcore.model.native_encoders import NATIVE


def training_cost(config: Config) -> PackingCost:
    """The recipe's cost weights; nothing of how the model is spread over ranks is in them."""
    model, vision, laver = config.model, config.vision, config.laver
    assert model.num_layers and model.hidden_size and model.ffn_hidden_size and model.kv_channels
    assert model.num_attention_heads and model.num_query_groups
    inner = laver.vision_head_hidden_size
    merged = vision.vision in NATIVE and vision.vision != "aimv2"  # Qwen's towers merge 2 x 2 patches
    return packing_cost(
        TransformerShape.of(
            num_layers=model.num_layers,
            hidden_size=model.hidden_size,
            num_heads=model.num_attention_heads,
            num_key_heads=model.num_query_groups,
            head_dim=model.kv_channels,
            ffn_size=model.ffn_hidden_size,
            ffn_matrices=3,
        ),
        lm_head=model.hidden_size * (model.vocab_size or 0),
        mixed=laver.mixed_attention,
        vision_head=2 * model.hidden_size * inner + inner**2 if laver.laver else None,
        gram_width=0 if laver.gram == "off" else model.hidden_size,
        tower=None if vision.vision_path is None else tower_shape(vision.vision_path),
        tower_trains=any(fnmatchcase("vision_encoder.weight", each) for each in config.train.trainable),
        patches_per_token=4 if merged else 1,
    )


def tower_shape(path: str) -> TransformerShape | None:
    """The shape of a Hugging Face directory's vision tower; None where it cannot be read.

    Building the tower then says what is wrong with it.
    """
    import transformers

    try:
        whole = transformers.AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError):
        return None
    tower = getattr(whole, "vision_config", whole)
    # Qwen2-VL says embed_dim where the others say hidden_size, and gives the decoder's width as hidden_size.
    hidden = int(getattr(tower, "embed_dim", None) or tower.hidden_size)
    heads = int(getattr(tower, "num_heads", None) or tower.num_attention_heads)
    inner = getattr(tower, "intermediate_size", None)
    gated = str(getattr(tower, "model_type", "")).startswith(("qwen2_5_vl", "aimv2"))
    return TransformerShape.of(
        num_layers=int(getattr(tower, "depth", None) or tower.num_hidden_layers),
        hidden_size=hidden,
        num_heads=heads,
        num_key_heads=heads,
        head_dim=hidden // heads,
        ffn_size=int(inner or hidden * tower.mlp_ratio),
        ffn_matrices=3 if gated else 2,
    )
