"""LaVer (arXiv 2512.06281) for transformers: a decoder with mixed attention and 2D rotary positions for images.

    pixels -> tower (or bare patches) -> connector -> visual tokens in the places of <|image_pad|> -> decoder

Two things differ from its architecture. A token of an image sees all tokens of that image, later ones too; everything
else is causal. And a visual token (r, c) of an image that begins at position p stands at (p, p + r, p + c),
the next text token at p + max(rows, columns), the three coordinates rotating their own bands of frequencies.

Shapes: B sequences, L tokens of this call, K tokens including the cache, I images, N visual tokens, D width.
"""

import itertools
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModel, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from .configuration_laver import LaverConfig
from .towers_laver import build_tower


def lay_out(
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    image_grids: torch.Tensor,
    config: LaverConfig,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions [3, B, L] and, per token, the index of its image [B, L], -1 for text.

    `input_ids` are whole sequences; `image_grids` [I, 2] holds (rows, columns) of their images in order.
    """
    positions = torch.zeros(3, *input_ids.shape, dtype=torch.long)
    image_ids = torch.full(input_ids.shape, -1)
    real = torch.ones_like(input_ids) if attention_mask is None else attention_mask[:, : input_ids.shape[1]]
    grids = image_grids.tolist()
    image = 0
    for row, (ids, is_real) in enumerate(zip(input_ids.tolist(), real.tolist(), strict=True)):
        places = [place for place, keep in enumerate(is_real) if keep]
        token, start = 0, 0  # index into places, and the position that it has
        while token < len(places):
            if ids[places[token]] != config.image_token_id:
                positions[:, row, places[token]] = start
                token, start = token + 1, start + 1
                continue
            if image >= len(grids):
                raise ValueError(f"more runs of image tokens than the {len(grids)} image(s)")
            rows, columns = grids[image]
            patches = places[token : token + rows * columns]
            if len(patches) < rows * columns or any(ids[p] != config.image_token_id for p in patches):
                raise ValueError(
                    f"image {image} has {rows} x {columns} tokens, the sequence fewer in its place"
                )
            offset = torch.arange(rows * columns)
            if config.rope_2d:
                axes = torch.stack([torch.zeros_like(offset), offset // columns, offset % columns])
            else:
                axes = offset.expand(3, -1)
            positions[:, row, patches] = start + axes
            image_ids[row, patches] = image
            start += max(rows, columns) if config.rope_2d else rows * columns
            token, image = token + rows * columns, image + 1
    if image != len(grids):
        raise ValueError(f"{len(grids)} image(s), but image tokens for {image}")
    return positions.to(input_ids.device), image_ids.to(input_ids.device)


def mixed_mask(
    image_ids: torch.Tensor, attention_mask: torch.Tensor | None, past: int, mixed: bool, dtype: torch.dtype
) -> torch.Tensor:
    """What every token of this call may see, [B, 1, L, K], as numbers to add to the scores.

    Tokens in the cache precede all tokens of this call; `image_ids` [B, L] are those of this call.
    """
    batch, length = image_ids.shape
    device = image_ids.device
    column, row = torch.arange(past + length, device=device), past + torch.arange(length, device=device)
    sees = (column[None, :] <= row[:, None]).expand(batch, -1, -1).clone()
    if mixed:
        sees[..., past:] |= (image_ids[:, :, None] == image_ids[:, None, :]) & (image_ids[:, :, None] >= 0)
    if attention_mask is not None:
        sees &= attention_mask[:, None, : past + length].bool()
        sees |= column[None, :] == row[:, None]  # padding sees itself: a softmax over nothing is not a number
    lowest = torch.finfo(dtype).min
    return torch.where(sees, 0.0, lowest).to(dtype)[:, None]


class LaverRotaryEmbedding(nn.Module):
    """cos and sin [B, L, C] from positions [3, B, L]: band f reads the axis that it belongs to.

    `mrope_section` counts the bands of t, row and column; they lie one axis after the other, or in turns.
    """

    def __init__(self, config: LaverConfig) -> None:
        super().__init__()
        text = config.text_config
        self.head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        rope = text.rope_parameters
        self.base = rope["rope_theta"]
        self.scaling = None
        if rope.get("rope_type", "default") == "llama3":
            names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
            self.scaling = [rope[name] for name in names]
        bands = [(turn, axis) for axis, count in enumerate(config.mrope_section) for turn in range(count)]
        self.axes = [axis for _, axis in (sorted(bands) if config.mrope_split == "interleaved" else bands)]

    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        # Computed here, not kept: a buffer would be cast along with the weights.
        exponents = torch.arange(0, self.head_dim, 2, dtype=torch.float32, device=x.device) / self.head_dim
        angles = position_ids.float()[self.axes].permute(1, 2, 0) * self._scaled(1.0 / self.base**exponents)
        angles = torch.cat([angles, angles], dim=-1)
        return angles.cos().to(x.dtype), angles.sin().to(x.dtype)

    def _scaled(self, frequencies: torch.Tensor) -> torch.Tensor:
        """Llama 3.1's slower low frequencies (arXiv 2407.21783, 3.4.2), where the decoder has them."""
        if self.scaling is None:
            return frequencies
        factor, low, high, positions = self.scaling
        kept = ((positions * frequencies / (2.0 * torch.pi) - low) / (high - low)).clamp(0.0, 1.0)
        return (1.0 - kept) * frequencies / factor + kept * frequencies


class LaverConnector(nn.Module):
    """Linear layers with GELU between them: two behind a tower, three on bare patches."""

    def __init__(self, sizes: list[int]) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for width, next_width in itertools.pairwise(sizes):
            layers += [nn.Linear(width, next_width), nn.GELU()]
        self.layers = nn.Sequential(*layers[:-1])

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.layers(features)


class LaverForConditionalGeneration(PreTrainedModel, GenerationMixin):
    """Images and text in, text out."""

    config_class = LaverConfig
    base_model_prefix = "model"
    vision_encoder: Any
    input_modalities = ("image", "text")
    main_input_name = "input_ids"
    _supports_sdpa = True
    _supports_flash_attn = False  # it takes no mask, and would silently be causal
    _supports_attention_backend = False
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012
    _no_split_modules = ["Qwen2DecoderLayer", "Qwen3DecoderLayer", "LlamaDecoderLayer"]  # noqa: RUF012

    def __init__(self, config: LaverConfig) -> None:
        super().__init__(config)
        width, hidden = config.text_config.hidden_size, config.connector_hidden_size
        if config.vision == "encoder-free":
            self.vision_encoder = None
            self.connector = LaverConnector([3 * config.patch_size**2, hidden, hidden, width])
        else:
            self.vision_encoder = build_tower(config)
            self.connector = LaverConnector([self.vision_encoder.hidden_size, hidden, width])
        self.model = AutoModel.from_config(config.text_config)
        self.model.rotary_emb = LaverRotaryEmbedding(config)
        self.lm_head = nn.Linear(width, config.text_config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.embed_tokens = value

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def get_image_features(self, pixel_values: torch.Tensor, image_grids: torch.Tensor) -> torch.Tensor:
        """Visual tokens [N, D] of all images; pixels [I, 3, H, W], or patches without an encoder or at native size."""
        features = pixel_values
        if self.vision_encoder is not None:
            features = self.vision_encoder(pixel_values, image_grids)
        tokens = self.connector(features.to(self.dtype))
        if self.config.normalize_visual_tokens:
            tokens = F.normalize(tokens.float(), dim=-1).to(tokens.dtype)
        return tokens

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        image_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        image_grids: torch.Tensor | None = None,
        past_key_values=None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """Logits [B, L, V]; `position_ids` [3, B, L] and `image_ids` [B, L] only when there is a cache.

        `generate` prepares both. `image_grids` [I, 2] are the (rows, columns) of the images.
        """
        past = 0 if past_key_values is None else int(past_key_values.get_seq_length())
        if position_ids is None or image_ids is None:
            if past:
                raise ValueError(
                    "with a cache, give position_ids and image_ids (lay_out of the whole sequences)"
                )
            grids = self._grids(input_ids, image_grids)
            position_ids, image_ids = lay_out(input_ids, attention_mask, grids, self.config)
        embeds = self.model.embed_tokens(input_ids)
        if pixel_values is not None:
            grids = self._grids(input_ids, image_grids)
            visual = self.get_image_features(pixel_values, grids).to(embeds.dtype)
            if len(visual) != int((image_ids >= 0).sum()):
                raise ValueError(
                    f"{len(visual)} visual tokens for {int((image_ids >= 0).sum())} image tokens"
                )
            embeds = embeds.masked_scatter((image_ids >= 0)[..., None], visual)
        mask = mixed_mask(image_ids, attention_mask, past, self.config.mixed_attention, embeds.dtype)
        if past_key_values is not None:  # a static cache has room for tokens that are not there yet
            num_keys, _ = past_key_values.get_mask_sizes(input_ids.shape[1], 0)
            mask = nn.functional.pad(mask, (0, num_keys - mask.shape[-1]), value=torch.finfo(mask.dtype).min)
        outputs = self.model(
            inputs_embeds=embeds,
            attention_mask=mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=self.config.text_config.vocab_size)
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=outputs.past_key_values)

    def _grids(self, input_ids: torch.Tensor, image_grids: torch.Tensor | None) -> torch.Tensor:
        """The given grids, or the model's fixed one for as many images as there are tokens for."""
        if image_grids is not None:
            return image_grids
        num_tokens = int((input_ids == self.config.image_token_id).sum())
        if self.config.image_grid is None and num_tokens:
            raise ValueError("images keep their shapes here: give image_grids, as the processor does")
        rows, columns = self.config.image_grid or (1, 1)
        num_images = num_tokens // (rows * columns)
        return torch.tensor([[rows, columns]] * num_images).reshape(-1, 2)

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.Tensor,
        past_key_values=None,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        image_grids: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | None = None,
        **_,
    ) -> dict:
        """What is new since the cache ends, with positions counted over the whole sequences."""
        past = 0 if past_key_values is None else int(past_key_values.get_seq_length())
        grids = self._grids(input_ids, image_grids)
        position_ids, image_ids = lay_out(input_ids, attention_mask, grids, self.config)
        new = slice(past, None)
        if past and bool((input_ids[:, new] == self.config.image_token_id).any()):
            raise ValueError(
                f"an image begins behind the {past} tokens of the cache, which cannot be encoded any more; "
                "generate from the whole conversation, without past_key_values"
            )
        return {
            "input_ids": input_ids[:, new].contiguous(),
            "position_ids": position_ids[..., new].contiguous(),
            "image_ids": image_ids[:, new].contiguous(),
            "attention_mask": attention_mask,
            "pixel_values": pixel_values if past == 0 else None,
            "image_grids": grids,
            "past_key_values": past_key_values,
            "use_cache": use_cache,
            "logits_to_keep": logits_to_keep or 0,
        }

    def _expand_inputs_for_generation(self, expand_size: int = 1, input_ids=None, **model_kwargs):
        """Repeat every sequence for beams or samples, and its images with it."""
        pixels, grids = model_kwargs.pop("pixel_values", None), model_kwargs.pop("image_grids", None)
        if expand_size > 1 and pixels is not None:
            grids = self._grids(input_ids, grids)
            _, image_ids = lay_out(input_ids, model_kwargs.get("attention_mask"), grids, self.config)
            rows = grids.prod(-1)
            if self.vision_encoder is not None:
                per_token = self.vision_encoder.rows_per_token
                rows = rows * per_token if per_token else torch.ones_like(rows)
            parts = list(pixels.split(rows.tolist()))
            order = [
                i for row in image_ids for _ in range(expand_size) for i in row[row >= 0].unique().tolist()
            ]
            pixels, grids = torch.cat([parts[i] for i in order]), grids[order]
        input_ids, model_kwargs = super()._expand_inputs_for_generation(
            expand_size=expand_size, input_ids=input_ids, **model_kwargs
        )
        return input_ids, {**model_kwargs, "pixel_values": pixels, "image_grids": grids}
