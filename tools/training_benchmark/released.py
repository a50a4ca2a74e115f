"""The released recipe of LaVer (arXiv 2512.06281), written anew and plainly on transformers, as a baseline.

Its cost is the released one: three passes of the language model over whole padded sequences, text included
(dialogue, masked student, teacher), a second module tree for the teacher, a dense mask through SDPA, logits of
every token, dense Gram matrices. Its mathematics is this engine's: in the student's and teacher's pass an image
sees itself alone, losses are divided by global counts, Gram matrices are per image and clipped.

Shapes: B samples, L tokens, N visual tokens, D width, K latent width, V vocabulary.
"""

import copy
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from laver_mcore.config.schema import Config
from laver_mcore.convert.names import entries, our_shape, split
from laver_mcore.data.sequence.prompt import IGNORE
from laver_mcore.model.initialize import draw
from laver_mcore.model.vision_encoders import build_vision_encoder
from tools.training_benchmark.batches import PaddedBatch
from tools.training_benchmark.setting import laver_settings


def mixed_mask(batch: PaddedBatch) -> torch.Tensor:
    """What every token sees in the dialogue, bool [B, L, L]: what precedes it, and its own image both ways."""
    place_L = torch.arange(batch.ids_BL.shape[1], device=batch.ids_BL.device)
    precedes_LL = place_L[None, :] <= place_L[:, None]
    return (precedes_LL | _same_image(batch)) & batch.is_real_BL[:, None, :] | torch.eye(
        len(place_L), dtype=torch.bool, device=place_L.device
    )  # padding sees itself: a softmax over nothing is not a number


def image_mask(batch: PaddedBatch) -> torch.Tensor:
    """The same for student and teacher, bool [B, L, L]: an image sees itself alone; nobody reads the text."""
    is_image_BL1 = batch.image_BL[:, :, None] >= 0
    return torch.where(is_image_BL1, _same_image(batch), mixed_mask(batch))


def _same_image(batch: PaddedBatch) -> torch.Tensor:
    image = batch.image_BL
    return (image[:, :, None] == image[:, None, :]) & (image[:, :, None] >= 0)


class ReleasedModel(nn.Module):
    """Tower, connector, language model, vision head and mask token; `teacher_*` is the second tree."""

    def __init__(self, config: Config, vocab_size: int, *, recompute: bool, device: torch.device) -> None:
        from transformers import Qwen2_5_VLTextModel

        super().__init__()
        self.dtype = torch.bfloat16 if config.train.bf16 else torch.float32
        model = config.model
        kind: dict[str, Any] = dict(dtype=self.dtype, device=device)
        assert model.hidden_size is not None
        width, inner = model.hidden_size, laver_settings(config).vision_head_hidden_size
        standard = torch.get_default_dtype()
        torch.set_default_dtype(self.dtype)
        with device:
            self.decoder = Qwen2_5_VLTextModel(_text_config(config, vocab_size))
        torch.set_default_dtype(standard)
        self.lm_head = nn.Linear(width, vocab_size, bias=False, **kind)
        self.vision_head = _mlp([width, inner, inner, width], last_bias=False, **kind)
        self.mask_token = nn.Parameter(torch.zeros(width, **kind))
        connector_width = config.vision.connector_hidden_size or width
        self.tower: Any = None
        if config.vision.is_encoder_free:
            self.connector = _mlp([3 * config.vision.patch_size**2, *[connector_width] * 2, width], **kind)
        else:
            tower = build_vision_encoder(
                config.vision.vision,
                path=config.vision.vision_path,
                random_init=True,
                seed=config.train.seed,
                **kind,
            )
            self.connector = _mlp([tower.hidden_size, connector_width, width], **kind)
            self.tower = tower.requires_grad_(False)
        if not model.untie_embeddings_and_output_weights:
            self.lm_head.weight = self.decoder.embed_tokens.weight
        self._load(config, vocab_size)
        self.teacher_decoder = copy.deepcopy(self.decoder).requires_grad_(False).eval()
        self.teacher_vision_head = copy.deepcopy(self.vision_head).requires_grad_(False)
        self.decoder.train()
        if recompute:
            self.decoder.gradient_checkpointing_enable(
                gradient_checkpointing_kwargs=dict(use_reentrant=False)
            )

    @torch.no_grad()
    def _load(self, config: Config, vocab_size: int) -> None:
        """The engine's own random weights, drawn by the engine's names and taken apart for transformers."""
        seed = config.train.seed
        own = {f"model.{name}": p for name, p in self.decoder.named_parameters()}
        own["lm_head.weight"] = self.lm_head.weight
        for entry in entries(config.model):
            full = draw(entry.ours, our_shape(entry, config.model, vocab_size), config.model, seed)
            for name, tensor in zip(entry.theirs, split(entry, full, config.model), strict=True):
                own.pop(name).copy_(tensor)
        assert own.keys() <= {"lm_head.weight"}, f"no weights for {sorted(own)}"
        stds = {weight.name: weight.std for weight in config.objective.parameters(config)}
        for prefix in ("connector", "vision_head"):
            for name, parameter in getattr(self, prefix).named_parameters():
                ours = f"{prefix}.layers.{name}"
                parameter.copy_(draw(ours, tuple(parameter.shape), config.model, seed, stds.get(ours)))
        self.mask_token.copy_(draw("mask_token", tuple(self.mask_token.shape), config.model, seed))

    def trainable(self) -> list[nn.Parameter]:
        """Every parameter that the optimizer moves, each once."""
        return [p for p in self.parameters() if p.requires_grad]

    def sums(self, batch: PaddedBatch, config: Config) -> torch.Tensor:
        """Sums over one micro-batch of the LM, MIM and Gram losses, fp32 [3], with gradients."""
        laver = laver_settings(config)
        with torch.no_grad():
            features = batch.pixels if self.tower is None else self.tower(batch.pixels).flatten(0, 1)
        visual_ND = self.connector(features.to(self.dtype))
        is_image_BL = batch.image_BL >= 0

        hidden_BLD = self._pass(self.decoder, batch, visual_ND, mixed_mask(batch))
        logits_BLV = self.lm_head(hidden_BLD).float()
        lm = F.cross_entropy(
            logits_BLV[:, :-1].flatten(0, 1),
            batch.labels_BL[:, 1:].flatten(),
            ignore_index=IGNORE,
            reduction="sum",
        )
        seen_ND = torch.where(batch.masked_N[:, None], self.mask_token, visual_ND)
        hidden_BLD = self._pass(self.decoder, batch, seen_ND, image_mask(batch))
        student_NK = self.vision_head(hidden_BLD[is_image_BL]).float()
        with torch.no_grad():
            hidden_BLD = self._pass(self.teacher_decoder, batch, visual_ND, image_mask(batch))
            teacher_NK = self.teacher_vision_head(hidden_BLD[is_image_BL]).float()

        target_MK = torch.softmax(teacher_NK[batch.masked_N] / laver.teacher_temperature, dim=-1)
        log_MK = torch.log_softmax(student_NK[batch.masked_N] / laver.student_temperature, dim=-1)
        mim = -(target_MK * log_MK).sum()
        gram = torch.stack(
            [
                (_gram(student) - _gram(teacher)).clamp(min=0).square().mean()
                for student, teacher in zip(
                    _by_image(student_NK, batch), _by_image(teacher_NK, batch), strict=True
                )
            ]
        ).sum()
        return torch.stack([lm, mim, gram])

    def _pass(
        self, decoder: Any, batch: PaddedBatch, visual_ND: torch.Tensor, sees_BLL: torch.Tensor
    ) -> torch.Tensor:
        embeds_BLD = decoder.embed_tokens(batch.ids_BL)
        embeds_BLD = embeds_BLD.masked_scatter((batch.image_BL >= 0)[..., None], visual_ND)
        lowest = torch.finfo(self.dtype).min
        mask_B1LL = torch.where(sees_BLL, 0.0, lowest).to(self.dtype)[:, None]
        return decoder(
            inputs_embeds=embeds_BLD,
            attention_mask={"full_attention": mask_B1LL},
            position_ids=batch.positions_3BL,
            use_cache=False,
        ).last_hidden_state

    @torch.no_grad()
    def move_teacher(self, momentum: float) -> None:
        """EMA parameter by parameter, in the model's own precision."""
        for student, teacher in (
            (self.decoder, self.teacher_decoder),
            (self.vision_head, self.teacher_vision_head),
        ):
            averages = dict(teacher.named_parameters())
            for name, parameter in student.named_parameters():
                averages[name].mul_(momentum).add_(parameter, alpha=1.0 - momentum)


def _text_config(config: Config, vocab_size: int) -> Any:
    from transformers import Qwen2_5_VLTextConfig

    model = config.model
    return Qwen2_5_VLTextConfig(
        vocab_size=vocab_size,
        hidden_size=model.hidden_size,
        intermediate_size=model.ffn_hidden_size,
        num_hidden_layers=model.num_layers,
        num_attention_heads=model.num_attention_heads,
        num_key_value_heads=model.num_query_groups,
        rms_norm_eps=model.norm_epsilon,
        rope_parameters=dict(
            rope_type="default", rope_theta=model.rotary_base, mrope_section=list(model.mrope_section or ())
        ),
        attn_implementation="sdpa",
        pad_token_id=None,
    )


def _mlp(sizes: list[int], last_bias: bool = True, **kind: Any) -> nn.Sequential:
    """Linear layers with GELU between them."""
    layers: list[nn.Module] = []
    for i in range(len(sizes) - 1):
        bias = last_bias or i < len(sizes) - 2
        layers += [nn.Linear(sizes[i], sizes[i + 1], bias=bias, **kind), nn.GELU()]
    return nn.Sequential(*layers[:-1])


def _by_image(latents_NK: torch.Tensor, batch: PaddedBatch) -> Iterator[torch.Tensor]:
    image_N = batch.image_BL[batch.image_BL >= 0]
    for image in image_N.unique():
        yield latents_NK[image_N == image]


def _gram(latents_NK: torch.Tensor) -> torch.Tensor:
    unit_NK = F.normalize(latents_NK, dim=-1)
    return unit_NK @ unit_NK.T
