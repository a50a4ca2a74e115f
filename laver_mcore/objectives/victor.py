"""ViCToR: visual comprehension via token reconstruction (arXiv 2410.14332).

Three quarters of an image's tokens are replaced, each by a row of its own of a learnable pool, and read out of the
decoder's final states again. Tokens have unit length in every stage:

    x [N, D] = tokens / ||tokens||    replaced ones: pool rows of the smallest total distance, one to one
    loss = SmoothL1(head(final states at all image positions) - x), mean over tokens and dimensions

Shapes: N visual tokens of a micro-batch, R replaced ones, P pool rows, D width.
"""

from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

from laver_mcore.config.errors import ConfigError
from laver_mcore.config.schema import AddedWeight, Config, ObjectiveConfig
from laver_mcore.data.sequence.batch import Batch
from laver_mcore.data.sequence.masking import draw_mask
from laver_mcore.device import send
from laver_mcore.model.method import Added, Entering, ModelOutput
from laver_mcore.objectives.head import Head, head_weights
from laver_mcore.objectives.matching import Matcher, distances
from laver_mcore.objectives.objective import LanguageModel, Parts, Plan, image_masks, joined

if TYPE_CHECKING:
    from laver_mcore.megatron.parallel import Topology

LOSS = "reconstruction_loss"


@dataclass(frozen=True, kw_only=True)
class VictorConfig(ObjectiveConfig):
    """Visual token reconstruction (arXiv 2410.14332), `objective: victor`."""

    name: ClassVar[str] = "victor"
    needs_images: ClassVar[bool] = True
    normalizes: ClassVar[bool] = True
    may_change: ClassVar[frozenset[str]] = frozenset({"match_threads"})

    replaced_share: float = 0.75
    """Share of an image's tokens that pool rows take the places of: all but floor((1 - share) N)."""
    pool_size: int = 2048
    """Rows of the learnable pool; no image may have more replaced tokens."""
    normalize_pool: bool = False
    """Give pool rows unit length where they are matched and used, as tokens have; off is the released code."""
    lazy_pool: bool = True
    """Leave pool rows that a step chose for no token where they are; off lets Adam's moments move them on."""
    lambda_victor: float = 10.0
    """Weight of the reconstruction loss."""
    smooth_l1_beta: float = 0.01
    """Difference at which the loss turns from quadratic to linear."""
    match_threads: int = 4
    """Host threads that match tokens with pool rows."""

    def check(self, config: Config) -> None:
        super().check(config)
        if not 0.0 <= self.replaced_share <= 1.0:
            raise ConfigError(f"replaced_share={self.replaced_share} is not between 0 and 1")
        for name in ("pool_size", "match_threads"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} must be at least 1")
        if not self.smooth_l1_beta > 0.0:
            raise ConfigError(f"smooth_l1_beta={self.smooth_l1_beta} must be positive")

    def parameters(self, config: Config) -> tuple[AddedWeight, ...]:
        assert config.model.hidden_size is not None
        width = config.model.hidden_size
        pool = AddedWeight(
            name="token_pool",
            shape=(self.pool_size, width),
            place="first",
            std=1.0,
            decays=False,
            lazy=self.lazy_pool,
        )
        return (pool, *head_weights("reconstruction_head", (width, width), std=0.02))

    def travelling(self) -> int:
        return 1  # the tokens, which are the targets

    def mask(
        self, config: Config, num_tokens: int, *, key: str, image_index: int, iteration: int
    ) -> np.ndarray:
        """Replaced tokens: a function of (seed, sample, image, iteration) alone."""
        kept = draw_mask(
            num_tokens,
            1.0 - self.replaced_share,
            seed=config.train.seed,
            key=key,
            step=iteration,
            image_index=image_index,
        )
        return ~kept

    def masked_share(self) -> float:
        return self.replaced_share

    def saved_per_visual_token(self, config: Config) -> int:
        return 3 * (config.model.hidden_size or 0)  # states, predictions, targets


@dataclass(frozen=True, kw_only=True)
class VictorPlan(Plan):
    """One micro-batch's replaced tokens."""

    visual_rows_N: torch.Tensor
    """Where visual tokens stand in the dialogue."""
    replaced_R: torch.Tensor
    """Numbers of the replaced tokens, image by image."""
    per_image: tuple[int, ...]
    """How many of them each image has."""
    answers: "dict[int, Future[np.ndarray]]" = field(default_factory=dict)
    """Image -> its pool rows; this rank works on some of the images."""


class Victor(LanguageModel):
    """The pool on the first stage, the head on the last, and the matching of tokens with pool rows between them."""

    Settings = VictorConfig
    looks_ahead = True

    @staticmethod
    def modules(config: Config, place: str, *, dtype: torch.dtype, device: torch.device) -> Added:
        settings, width = config.objective, config.model.hidden_size
        assert isinstance(settings, VictorConfig) and width is not None
        if place == "first":
            rows = torch.zeros(settings.pool_size, width, dtype=dtype, device=device)
            return {"token_pool": torch.nn.Parameter(rows)}
        return {"reconstruction_head": Head((width, width), torch.nn.Identity, dtype=dtype, device=device)}

    @classmethod
    def build(cls, config: Config, parts: Parts) -> "Victor":
        return cls(config, parts.topology, parts.own("token_pool"), parts.own("reconstruction_head"))

    def __init__(self, config: Config, topology: "Topology", pool: Any, head: Any) -> None:
        assert isinstance(config.objective, VictorConfig)
        self._recipe, self._config, self._topology = config, config.objective, topology
        self._pool, self._head = pool, head
        self.weights: Mapping[str, float] = {LOSS: self._config.lambda_victor}
        self.matcher = Matcher(self._config.match_threads)

    def plan(self, batch: Batch, iteration: int) -> VictorPlan:
        masks = image_masks(self._recipe, batch, iteration)
        per_image = tuple(int(mask.sum()) for mask in masks)
        if max(per_image, default=0) > self._config.pool_size:
            raise ConfigError(
                f"an image has {max(per_image)} replaced tokens and pool_size is {self._config.pool_size}; raise it"
            )
        replaced_R = np.flatnonzero(joined(masks))
        return VictorPlan(
            counts={LOSS: sum(batch.image_lengths)},
            masked=len(replaced_R),
            visual_rows_N=send(batch.visual_rows_N, self._topology.device),
            replaced_R=send(torch.from_numpy(replaced_R), self._topology.device),
            per_image=per_image,
        )

    def _rows(self) -> torch.Tensor:
        return F.normalize(self._pool, dim=-1) if self._config.normalize_pool else self._pool

    @torch.no_grad()
    def prepare(self, visual_ND: torch.Tensor, plan: VictorPlan) -> None:
        """Ranks that hold the same tokens share the images out."""
        group, pool_PD = self._topology.tp_cp_group, self._rows()
        replaced = visual_ND.detach().index_select(0, plan.replaced_R).split(list(plan.per_image))
        for image in range(group.rank(), len(replaced), group.size()):
            plan.answers[image] = self.matcher.submit(distances(replaced[image], pool_PD))

    def _chosen(self, plan: VictorPlan) -> torch.Tensor:
        """Pool row of every replaced token, int64 [R], the same on all ranks of the first stage."""
        found = dict(zip(plan.answers, self.matcher.wait(list(plan.answers.values())), strict=True))
        chosen = [found.get(i, np.zeros(n, dtype=np.int64)) for i, n in enumerate(plan.per_image)]
        chosen_R = torch.from_numpy(np.concatenate([np.zeros(0, dtype=np.int64), *chosen]))
        chosen_R = send(chosen_R, self._topology.device)
        if self._topology.tp_cp_group.size() > 1:
            dist.all_reduce(chosen_R, group=self._topology.tp_cp_group)
        return chosen_R

    def enter(self, visual_ND: torch.Tensor, plan: VictorPlan) -> Entering:
        if not plan.answers:
            self.prepare(visual_ND, plan)
        rows_RD = self._rows().index_select(0, self._chosen(plan))
        return Entering(
            dialogue_ND=visual_ND.index_copy(0, plan.replaced_R, rows_RD.to(visual_ND.dtype)),
            travelling=(visual_ND.detach(),),
        )

    def sums(self, output: ModelOutput, plan: VictorPlan) -> Mapping[str, torch.Tensor]:
        (tokens_ND,) = output.travelling
        predicted_ND = self._head(output.dialogue_TD.index_select(0, plan.visual_rows_N)).float()
        target_ND = F.normalize(tokens_ND.detach().float(), dim=-1)
        losses_ND = F.smooth_l1_loss(
            predicted_ND, target_ND, beta=self._config.smooth_l1_beta, reduction="none"
        )
        return {LOSS: losses_ND.mean(-1).sum()}
