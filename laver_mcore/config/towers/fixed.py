"""Towers at fixed resolution: SigLIP and SigLIP2 (arXiv 2502.14786), CLIP (2103.00020), DINOv2 (2304.07193)."""

from laver_mcore.config.towers.spec import Settings, TowerNames, TowerShape, TowerSpec

OTHER_PARTS = (
    "text_model.", "text_projection.", "visual_projection.", "logit_scale", "logit_bias", "classifier.",
)  # fmt: skip
PROJECTIONS = ("k_proj", "v_proj", "q_proj", "out_proj")


def vit_shape(spec: TowerSpec, settings: Settings, layer: int) -> TowerShape:
    """A plain ViT, cut behind `layer` (-1: whole)."""
    width, side = settings["hidden_size"], settings["image_size"] // settings["patch_size"]
    gated = bool(settings.get("use_swiglu_ffn"))
    return TowerShape(
        kind=spec.name,
        width=width,
        layers=settings["num_hidden_layers"] + layer + 1,
        ffn=_ratio_ffn(settings, gated) if "mlp_ratio" in spec.defaults else settings["intermediate_size"],
        gated=gated,
        patch_numbers=settings["num_channels"] * settings["patch_size"] ** 2,
        positions=side**2 + spec.has_cls,
        prefix_tokens=spec.prefix_tokens(settings),
        merge=1,
        output_width=width,
        final_norm=spec.norms_last_state and layer == -1,
        fixed_tokens=side**2,
    )


def _ratio_ffn(settings: Settings, gated: bool) -> int:
    """DINOv2's: a multiple of the width, or with SwiGLU two thirds of it in steps of 8."""
    inner = int(settings["hidden_size"] * settings["mlp_ratio"])
    return (int(inner * 2 / 3) + 7) // 8 * 8 if gated else inner


SIGLIP = TowerSpec(
    name="siglip",
    model_types=("siglip", "siglip_vision_model"),
    package="siglip",
    model="SiglipVisionModel",
    settings="SiglipVisionConfig",
    defaults=dict(
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=12,
        num_attention_heads=12,
        image_size=224,
        patch_size=16,
        num_channels=3,
    ),
    # SigLIP2-so400m/14-384
    published=dict(
        hidden_size=1152,
        intermediate_size=4304,
        num_hidden_layers=27,
        num_attention_heads=16,
        image_size=384,
        patch_size=14,
    ),
    names=TowerNames(
        patches="embeddings.patch_embedding",
        patch_biases=True,
        positions="embeddings.position_embedding.weight",
        layers="encoder.layers",
        attention="self_attn",
        projections=PROJECTIONS,
        mlp="mlp",
        norms=("layer_norm1", "layer_norm2"),
        final_norm=("post_layernorm", True),
    ),
    shape=vit_shape,
    final_norm="post_layernorm",
    weights_below="vision_model.",
    other_parts=OTHER_PARTS,
)

CLIP = TowerSpec(
    name="clip",
    model_types=("clip", "clip_vision_model"),
    package="clip",
    model="CLIPVisionModel",
    settings="CLIPVisionConfig",
    defaults=dict(
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=12,
        num_attention_heads=12,
        image_size=224,
        patch_size=32,
        num_channels=3,
    ),
    # CLIP-L/14-336
    published=dict(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
    ),
    names=TowerNames(
        patches="embeddings.patch_embedding",
        prefix=(("embeddings.class_embedding", 0),),
        positions="embeddings.position_embedding.weight",
        first_norm=("pre_layrnorm", True),
        layers="encoder.layers",
        attention="self_attn",
        projections=PROJECTIONS,
        mlp="mlp",
        norms=("layer_norm1", "layer_norm2"),
    ),
    shape=vit_shape,
    final_norm="post_layernorm",
    norms_last_state=False,
    prefix_tokens=lambda settings: 1,
    has_cls=True,
    weights_below="vision_model.",
    other_parts=OTHER_PARTS,
)

DINOV2 = TowerSpec(
    name="dinov2",
    model_types=("dinov2",),
    package="dinov2",
    model="Dinov2Model",
    settings="Dinov2Config",
    defaults=dict(
        hidden_size=768,
        num_hidden_layers=12,
        num_attention_heads=12,
        image_size=224,
        patch_size=14,
        num_channels=3,
        mlp_ratio=4,
    ),
    # DINOv2-L/14
    published=dict(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, image_size=518),
    names=TowerNames(
        patches="embeddings.patch_embeddings.projection",
        patch_biases=True,
        prefix=(("embeddings.cls_token", 1),),
        positions="embeddings.position_embeddings",
        layers="encoder.layer",
        attention="attention",
        projections=("q_proj", "k_proj", "v_proj", "o_proj"),
        mlp="mlp",
        norms=("norm1", "norm2"),
        layer_scale=True,
        final_norm=("layernorm", True),
    ),
    shape=vit_shape,
    layers="layer",
    final_norm="layernorm",
    prefix_tokens=lambda settings: 1,
    has_cls=True,
    any_size=True,
    weights_below="dinov2.",
    other_parts=OTHER_PARTS,
)
