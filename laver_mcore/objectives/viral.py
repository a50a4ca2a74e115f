"""VIRAL: visual representation alignment (arXiv 2509.07979).

States of chosen decoder layers at the dialogue's visual tokens are projected and turned towards what a frozen vision
foundation model sees in the same image:

    loss = - mean over images and layers of mean_i cos(projector(e_i), y_i)

The frozen encoder works on the first pipeline stage, where the pixels are, on this rank's share of the images; its
features travel to the last stage, and so do the states, where the projector and the loss are: the rows are few beside
the decoder's own. It sees what the tower sees of an image, in its own size and normalisation; or its features were kept
by laver prepare-targets and are read with the images.

Shapes: N visual tokens of a micro-batch, D width, Z width of the frozen encoder.
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F

from laver_mcore.config.errors import ConfigError
from laver_mcore.config.schema import AddedWeight, Config, ObjectiveConfig, TrainConfig
from laver_mcore.config.targets import TargetEncoder, TargetKind
from laver_mcore.data.errors import DataError
from laver_mcore.data.images.target_cache import TargetCache
from laver_mcore.data.order.balance import image_shares
from laver_mcore.data.sequence.batch import Batch
from laver_mcore.device import send
from laver_mcore.model.frozen_encoders import build_frozen_encoder, target_width
from laver_mcore.model.image_sharing import gather_shares
from laver_mcore.model.method import Added, Entering, ModelOutput
from laver_mcore.objectives.head import Head, head_weights
from laver_mcore.objectives.objective import LanguageModel, Parts, Plan

if TYPE_CHECKING:
    from laver_mcore.megatron.parallel import Topology

LOSS = "alignment_loss"
Grid = tuple[int, int]


@functools.cache  # asked for whenever work is counted
def _width(target: TargetEncoder) -> int:
    if target.cache is None:
        return target_width(target)
    try:
        return TargetCache(target.cache).width
    except DataError as error:
        raise ConfigError(str(error)) from None


@dataclass(frozen=True, kw_only=True)
class ViralConfig(ObjectiveConfig):
    """Visual representation alignment (arXiv 2509.07979), `objective: viral`."""

    name: ClassVar[str] = "viral"
    needs_images: ClassVar[bool] = True

    target: TargetKind = "dinov2"
    """Kind of the frozen encoder."""
    target_path: str | None = None
    """Hugging Face directory of the frozen encoder: config, weights and preprocessor_config.json."""
    target_cache: str | None = None
    """Directory of its features, made by laver prepare-targets: the encoder itself is then not needed."""
    target_image_size: int | None = None
    """Side in pixels of its input; its processor's own by default."""
    target_random_init: bool = False
    """Random weights for it: a control that says what of a gain is content."""
    target_remote_code: bool = False
    """Run the Python files in its directory, which RADIO needs; read them first."""
    target_width: int | None = None
    """Numbers of a feature, for target=radio, whose config does not say."""
    target_layers: tuple[int, ...] = (16,)
    """Decoder layers, counted from 1, whose outputs are aligned."""
    lambda_viral: float = 0.5
    """Weight of the alignment loss."""
    projector_hidden_size: int = 2048
    """Inner width of the 3-layer projector."""
    shared_projector: bool = True
    """One projector for all layers, as the released code has by default; off gives each layer its own."""

    def check(self, config: Config) -> None:
        super().check(config)
        layers = config.model.num_layers or 0
        if self.target_path is None and self.target_cache is None:
            raise ConfigError(
                "objective=viral needs target_path, a Hugging Face directory of the frozen encoder, or target_cache"
            )
        if self.target_image_size is not None and self.target_image_size < 1:
            raise ConfigError(f"target_image_size={self.target_image_size} must be positive")
        if not self.target_layers or sorted(set(self.target_layers)) != list(self.target_layers):
            raise ConfigError(f"target_layers={self.target_layers} must be rising numbers, at least one")
        if self.target_layers[0] < 1 or self.target_layers[-1] > layers:
            raise ConfigError(f"target_layers={self.target_layers}: the decoder has layers 1 to {layers}")
        self.width(config)  # which names a directory that cannot be read

    def width(self, config: Config) -> int:
        """Z of the frozen encoder; `ConfigError` where its features do not fit into the decoder's rows."""
        assert config.model.hidden_size is not None
        found = _width(self.target_encoder())
        known = self.target_cache or (self.target_path and Path(self.target_path).is_dir())
        if known and found > config.model.hidden_size:
            raise ConfigError(
                f"the frozen encoder's width {found} is more than the decoder's {config.model.hidden_size}"
            )
        return found

    def projectors(self) -> tuple[str, ...]:
        """Name of every layer's projector."""
        if self.shared_projector:
            return ("projector",) * len(self.target_layers)
        return tuple(f"projector_{layer}" for layer in self.target_layers)

    def projector_widths(self, config: Config) -> tuple[int, ...]:
        assert config.model.hidden_size is not None
        inner = self.projector_hidden_size
        return (config.model.hidden_size, inner, inner, self.width(config))

    def parameters(self, config: Config) -> tuple[AddedWeight, ...]:
        uses, found = self.projectors(), list[AddedWeight]()
        for name in dict.fromkeys(uses):
            found += head_weights(name, self.projector_widths(config), std=0.02, uses=uses.count(name))
        return tuple(found)

    def target_encoder(self) -> TargetEncoder:
        return TargetEncoder(
            kind=self.target,
            path=self.target_path,
            cache=self.target_cache,
            image_size=self.target_image_size,
            random_init=self.target_random_init,
            remote_code=self.target_remote_code,
            width=self.target_width,
        )

    def travelling(self) -> int:
        return 1 + len(self.target_layers)  # targets, and states

    def saved_per_visual_token(self, config: Config) -> int:
        each = 4 * self.projector_hidden_size + 2 * self.width(config) + (config.model.hidden_size or 0)
        return each * len(self.target_layers)


@dataclass(frozen=True, kw_only=True)
class ViralPlan(Plan):
    """One micro-batch's images as the frozen encoder wants them."""

    targets: torch.Tensor | None
    """Of this rank's share of them, pixels or the frozen encoder's features; None on later stages."""
    share_grids: tuple[tuple[Grid, ...], ...]
    """Grids of visual tokens of every rank's share."""
    per_token_N: torch.Tensor
    """1 over the number of tokens of the image that a visual token belongs to, fp32."""


class Viral(LanguageModel):
    """The frozen encoder on the first stage, the projectors on the last."""

    Settings = ViralConfig

    @staticmethod
    def modules(config: Config, place: str, *, dtype: torch.dtype, device: torch.device) -> Added:
        settings = config.objective
        assert isinstance(settings, ViralConfig)
        if place == "first":
            return {}
        widths = settings.projector_widths(config)
        names = dict.fromkeys(settings.projectors())
        return {name: Head(widths, torch.nn.SiLU, dtype=dtype, device=device) for name in names}

    @classmethod
    def build(cls, config: Config, parts: Parts) -> "Viral":
        settings = config.objective
        assert isinstance(settings, ViralConfig)
        encoder: Callable[[torch.Tensor], tuple[torch.Tensor, Grid]] | None = None
        if parts.topology.on_first_stage:
            encoder = _encoder(settings.target_encoder(), config.train, parts.topology.device)
        return cls(config, parts.topology, encoder, [parts.own(name) for name in settings.projectors()])

    def __init__(self, config: Config, topology: "Topology", encoder: Any, projectors: list[Any]) -> None:
        assert isinstance(config.objective, ViralConfig)
        self._config, self._topology = config.objective, topology
        self._encoder, self._projectors, self._width = encoder, projectors, config.objective.width(config)
        self.taps = config.objective.target_layers
        self.weights: Mapping[str, float] = {LOSS: config.objective.lambda_viral}

    def plan(self, batch: Batch, iteration: int) -> ViralPlan:
        lengths, device = np.asarray(batch.image_lengths, dtype=np.int64), self._topology.device
        shares = image_shares(batch.image_grids, self._topology.num_shares)
        return ViralPlan(
            counts={LOSS: len(lengths)},
            targets=None if batch.targets is None else send(batch.targets, device),
            share_grids=tuple(batch.image_grids[start:stop] for start, stop in shares),
            per_token_N=send(torch.from_numpy(np.repeat(1.0 / lengths, lengths).astype(np.float32)), device),
        )

    @torch.no_grad()
    def enter(self, visual_ND: torch.Tensor, plan: ViralPlan) -> Entering:
        assert plan.targets is not None
        features_InZ, grid = self._encoder(plan.targets)
        local_nZ = resample(features_InZ, grid, plan.share_grids[self._topology.share])
        counts = tuple(sum(h * w for h, w in share) for share in plan.share_grids)
        target_NZ = gather_shares(local_nZ, counts, self._topology.tp_cp_group, self._topology.cp_group)
        padded_ND = F.pad(target_NZ, (0, visual_ND.shape[1] - self._width)).to(visual_ND.dtype)
        return Entering(dialogue_ND=visual_ND, travelling=(padded_ND,))

    def sums(self, output: ModelOutput, plan: ViralPlan) -> Mapping[str, torch.Tensor]:
        targets_ND, *states = output.travelling
        target_NZ = targets_ND[:, : self._width].detach().float()
        total = target_NZ.new_zeros(())
        for states_ND, projector in zip(states, self._projectors, strict=True):
            cosine_N = F.cosine_similarity(projector(states_ND).float(), target_NZ, dim=-1)
            total = total - (cosine_N * plan.per_token_N).sum()
        return {LOSS: total / len(states)}


def _encoder(
    target: TargetEncoder, train: TrainConfig, device: torch.device
) -> Callable[[torch.Tensor], tuple[torch.Tensor, Grid]]:
    """What turns `Batch.targets` into features [I, n, Z] and their grid."""
    if target.cache is not None:
        grid = TargetCache(target.cache).grid
        return lambda features_InZ: (features_InZ.view(torch.bfloat16), grid)
    return build_frozen_encoder(
        target, seed=train.seed, dtype=torch.bfloat16 if train.bf16 else torch.float32, device=device
    )


def resample(features_InZ: torch.Tensor, source: Grid, grids: tuple[Grid, ...]) -> torch.Tensor:
    """Features of I images on the encoder's grid -> rows [n, Z] on the decoder's grids, image by image, fp32.

    Bilinear, and averaged where the decoder's grid is the coarser one.
    """
    rows = [features_InZ.new_zeros(0, features_InZ.shape[-1], dtype=torch.float32)]
    for features_nZ, grid in zip(features_InZ, grids, strict=True):
        image_1ZHW = features_nZ.float().T.reshape(1, -1, *source)
        if grid != source:
            image_1ZHW = F.interpolate(
                image_1ZHW, size=grid, mode="bilinear", antialias=True, align_corners=False
            )
        rows.append(image_1ZHW[0].flatten(1).T)
    return torch.cat(rows)
