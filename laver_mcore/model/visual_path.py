"""Images -> visual tokens: a vision encoder, if there is one, and the connector behind it."""

from typing import Any

import torch

from laver_mcore.config.schema import Config
from laver_mcore.model.connector import Connector
from laver_mcore.model.native_encoders import NativeEncoder, build_native_encoder
from laver_mcore.model.vision_encoders import PatchEmbedder, VisionEncoder, build_vision_encoder


def build_visual_path(
    config: Config, *, dtype: torch.dtype, device: torch.device
) -> tuple[VisionEncoder | NativeEncoder | None, torch.nn.Module]:
    """(encoder, connector) as the recipe wants them; patches are embedded by the connector where there is no encoder.

    Every tensor- and context-parallel rank encodes a share of the images, which its parameters are marked with.
    """
    vision = config.vision
    assert config.model.hidden_size is not None
    width, kind = config.model.hidden_size, dict[str, Any](dtype=dtype, device=device)
    hidden = vision.connector_hidden_size or width
    random_start = dict[str, Any](random_init=vision.vision_random_init, seed=config.train.seed, **kind)
    encoder: VisionEncoder | NativeEncoder | None = None
    if vision.is_native:
        assert vision.vision_path is not None
        encoder = build_native_encoder(vision.vision, path=vision.vision_path, **random_start)
    elif vision.tower is not None:
        encoder = build_vision_encoder(
            vision.vision,
            path=vision.vision_path,
            layer=vision.vision_layer,
            select=vision.vision_select,
            **random_start,
        )
    connector: torch.nn.Module
    if encoder is None:
        connector = PatchEmbedder(vision.patch_size, hidden, width, **kind)
    else:
        connector = Connector(encoder.hidden_size, hidden, width, **kind)
    for module in (encoder, connector):
        for parameter in module.parameters() if module is not None else ():
            parameter.shared_over_tp = True  # type: ignore[attr-defined]
    return encoder, connector
