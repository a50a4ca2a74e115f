"""Configuration of an exported LaVer model: a decoder of transformers, a visual path, and how image tokens are
arranged.
"""

from typing import Any

from transformers import AutoConfig, PreTrainedConfig


class LaverConfig(PreTrainedConfig):
    """`vision` is encoder-free or the kind of a transformers tower; `tower` says which classes compute it, and
    `vision_config` holds its own settings.
    """

    model_type = "laver"
    sub_configs = {"text_config": AutoConfig}  # noqa: RUF012

    def __init__(
        self,
        text_config: dict[str, Any] | PreTrainedConfig | None = None,
        vision: str = "encoder-free",
        tower: dict[str, Any] | None = None,
        vision_config: dict[str, Any] | None = None,
        vision_layer: int = -1,
        patch_size: int = 16,
        connector_hidden_size: int = 1024,
        normalize_visual_tokens: bool = False,
        image_grid: list[int] | tuple[int, int] | None = (1, 1),
        image_token_id: int = 0,
        mrope_section: list[int] | tuple[int, int, int] = (0, 32, 32),
        mrope_split: str = "contiguous",  # of models exported before there was a choice
        rope_2d: bool = True,
        mixed_attention: bool = True,
        **kwargs: Any,
    ) -> None:
        if not isinstance(text_config, PreTrainedConfig):
            text_config = AutoConfig.for_model(**{"model_type": "qwen2", **(text_config or {})})
        text: Any = text_config
        self.text_config = text
        self.vision = vision
        self.tower = tower or {}
        self.vision_config = vision_config
        self.vision_layer = vision_layer
        self.patch_size = patch_size
        self.connector_hidden_size = connector_hidden_size
        self.normalize_visual_tokens = normalize_visual_tokens
        self.image_grid = None if image_grid is None else list(image_grid)
        self.image_token_id = image_token_id
        if mrope_split not in ("contiguous", "interleaved"):
            raise ValueError(f"mrope_split={mrope_split!r}, wanted contiguous or interleaved")
        self.mrope_section = list(mrope_section)
        self.mrope_split = mrope_split
        self.rope_2d = rope_2d
        self.mixed_attention = mixed_attention
        kwargs.setdefault("tie_word_embeddings", text.tie_word_embeddings)
        super().__init__(**kwargs)
