"""Towers at native resolution: AIMv2 (arXiv 2411.14402), Qwen2-VL's (2409.12191) and Qwen2.5-VL's (2502.13923)."""

from dataclasses import replace

from laver_mcore.config.towers.spec import Settings, TowerNames, TowerShape, TowerSpec


def _aimv2_shape(spec: TowerSpec, settings: Settings, layer: int) -> TowerShape:
    return TowerShape(
        kind=spec.name,
        width=settings["hidden_size"],
        layers=settings["num_hidden_layers"],
        ffn=settings["intermediate_size"],
        gated=True,
        patch_numbers=settings["num_channels"] * settings["patch_size"] ** 2,
        positions=0,
        prefix_tokens=0,
        merge=1,
        output_width=settings["hidden_size"],
        final_norm=True,
        biases=settings["mlp_bias"],
    )


AIMV2 = TowerSpec(
    name="aimv2",
    model_types=("aimv2", "aimv2_vision_model"),
    package="aimv2",
    model="Aimv2VisionModel",
    settings="Aimv2VisionConfig",
    defaults=dict(
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=24,
        num_attention_heads=8,
        image_size=224,
        patch_size=14,
        num_channels=3,
        qkv_bias=False,
        mlp_bias=False,
    ),
    published={},  # AIMv2-L/14 native
    names=TowerNames(
        patches="embeddings.patch_embed",
        patch_biases=True,
        first_norm=("embeddings.rms_norm", False),
        layers="encoder.layers",
        attention="attention",
        projections=("k_proj", "v_proj", "q_proj", "out_proj"),
        mlp="ffn",
        norms=("rms_norm1", "rms_norm2"),
        norm_biases=False,
        final_norm=("rms_norm", False),
    ),
    shape=_aimv2_shape,
    native="aimv2",
    weights_below="vision_model.",
    other_parts=(
        "text_model.",
        "text_projection.",
        "visual_projection.",
        "logit_scale",
        "vision_model.head.",
        "head.",
    ),
)


def _qwen2_shape(spec: TowerSpec, settings: Settings, layer: int) -> TowerShape:
    width = settings["embed_dim"]
    return _merging(spec, settings, width, settings["hidden_size"], int(width * settings["mlp_ratio"]))


def _qwen25_shape(spec: TowerSpec, settings: Settings, layer: int) -> TowerShape:
    ffn, merged = settings["intermediate_size"], settings["spatial_merge_size"] * settings["patch_size"]
    plain = _merging(spec, settings, settings["hidden_size"], settings["out_hidden_size"], ffn)
    full = len(settings["fullatt_block_indexes"])
    return replace(plain, gated=True, window=settings["window_size"] // merged, full_layers=full)


def _merging(spec: TowerSpec, settings: Settings, width: int, output_width: int, ffn: int) -> TowerShape:
    channels = settings.get("in_channels", settings["num_channels"])
    return TowerShape(
        kind=spec.name,
        width=width,
        layers=settings["depth"],
        ffn=ffn,
        gated=False,
        patch_numbers=channels * settings["temporal_patch_size"] * settings["patch_size"] ** 2,
        positions=0,
        prefix_tokens=0,
        merge=settings["spatial_merge_size"],
        output_width=output_width,
        final_norm=False,
    )


_DECODER = (
    "lm_head.", "language_model.", "model.language_model.", "model.layers.", "model.embed_tokens.", "model.norm.",
)  # fmt: skip
_QWEN_NAMES = TowerNames(
    patches="patch_embed.proj",
    layers="blocks",
    attention="attn",
    projections=("qkv", "proj"),
    mlp="mlp",
    norms=("norm1", "norm2"),
    merger_norm_bias=True,
)

QWEN2_VL = TowerSpec(
    name="qwen2-vl",
    model_types=("qwen2_vl", "qwen2_vl_vision"),
    package="qwen2_vl",
    model="Qwen2VisionTransformerPretrainedModel",
    settings="Qwen2VLVisionConfig",
    defaults=dict(
        embed_dim=1280,
        hidden_size=3584,
        depth=32,
        num_heads=16,
        patch_size=14,
        temporal_patch_size=2,
        spatial_merge_size=2,
        mlp_ratio=4,
        num_channels=3,
    ),
    published={},  # Qwen2-VL-7B's
    names=_QWEN_NAMES,
    shape=_qwen2_shape,
    native="qwen",
    weights_below="visual.",
    other_parts=_DECODER,
)

QWEN25_VL = TowerSpec(
    name="qwen2.5-vl",
    model_types=("qwen2_5_vl", "qwen2_5_vl_vision"),
    package="qwen2_5_vl",
    model="Qwen2_5_VisionTransformerPretrainedModel",
    settings="Qwen2_5_VLVisionConfig",
    defaults=dict(
        hidden_size=3584,
        intermediate_size=3420,
        out_hidden_size=3584,
        depth=32,
        num_heads=16,
        patch_size=14,
        temporal_patch_size=2,
        spatial_merge_size=2,
        window_size=112,
        fullatt_block_indexes=(7, 15, 23, 31),
        num_channels=3,
    ),
    published=dict(hidden_size=1280),  # Qwen2.5-VL-7B's
    names=replace(_QWEN_NAMES, norm_biases=False, merger_norm_bias=False),
    shape=_qwen25_shape,
    native="qwen",
    weights_below="visual.",
    other_parts=_DECODER,
)
