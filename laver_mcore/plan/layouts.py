"""Every parallel layout of a recipe on a number of GPUs, and why some cannot run."""

import itertools
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Literal

from laver_mcore.config.checks import check, check_world
from laver_mcore.config.errors import ConfigError
from laver_mcore.config.schema import Config

NODE = 8
"""GPUs of one node; tensor and context parallelism do not leave it."""
MICRO_BATCHES = (1, 2, 4, 8)
Recompute = Literal["selective", "full"] | None
RECOMPUTE: tuple[Recompute, ...] = (None, "selective", "full")
VIRTUAL = (1, 2, 4, 5, 7, 8, 10)
"""Chunks per pipeline rank that are tried."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How a recipe is spread over GPUs."""

    tp: int
    pp: int
    vp: int
    cp: int
    dp: int
    micro_batch: int
    recompute: Recompute

    @property
    def model_size(self) -> int:
        """GPUs of one model replica."""
        return self.tp * self.pp * self.cp

    def apply(self, config: Config) -> Config:
        """The recipe under this layout; sequence parallelism with TP, sharded optimizer with DP."""
        shards = self.dp * self.cp > 1
        parallel = replace(
            config.parallel,
            tensor_model_parallel_size=self.tp,
            pipeline_model_parallel_size=self.pp,
            num_virtual_stages_per_pipeline_rank=self.vp if self.vp > 1 else None,
            context_parallel_size=self.cp,
            sequence_parallel=self.tp > 1,
            use_distributed_optimizer=shards,
            overlap_param_gather=config.parallel.overlap_param_gather and shards,
            recompute_granularity=self.recompute,
            recompute_method="uniform" if self.recompute == "full" else None,
            recompute_num_layers=1 if self.recompute == "full" else None,
        )
        train = replace(config.train, micro_batch_size=self.micro_batch)
        return replace(config, parallel=parallel, train=train)

    def as_dict(self) -> dict[str, int | str | None]:
        """For JSON."""
        return asdict(self)


def candidates(config: Config, num_gpus: int) -> Iterator[Layout]:
    """All combinations of sizes that multiply to `num_gpus`, whether or not they can run."""
    layers = config.model.num_layers or 1
    for tp, cp in itertools.product(_divisors(NODE), repeat=2):
        if NODE % (tp * cp) or num_gpus % (tp * cp):
            continue
        left = num_gpus // tp // cp
        for pp in _divisors(math.gcd(left, layers)):
            virtual = [vp for vp in VIRTUAL if layers // pp % vp == 0] if pp > 1 else [1]
            for vp, micro_batch, recompute in itertools.product(virtual, MICRO_BATCHES, RECOMPUTE):
                yield Layout(
                    tp=tp, pp=pp, vp=vp, cp=cp, dp=left // pp, micro_batch=micro_batch, recompute=recompute
                )  # fmt: skip


def _divisors(value: int) -> list[int]:
    return [d for d in range(1, value + 1) if value % d == 0]


def refusal(config: Config, num_gpus: int) -> str | None:
    """The line with which the run itself would refuse this configuration; None where it runs."""
    try:
        check(config)
        check_world(config, num_gpus)
    except ConfigError as error:
        return str(error)
    return None
