"""Held-out language-model loss: one sum over one count, the same number under every parallel layout."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from laver_mcore.data.sequence.batch import Batch
from laver_mcore.data.serve.exchange import Exchange
from laver_mcore.data.serve.loader import DialogueData
from laver_mcore.device import send
from laver_mcore.generate import evaluation_mode
from laver_mcore.model.inputs import ModelInputs, model_inputs, num_student_rows
from laver_mcore.model.method import ModelOutput
from laver_mcore.objectives.next_token import next_token_sum
from laver_mcore.train.engine import Engine
from laver_mcore.train.pipeline import even_rows, run_pipeline


@dataclass(frozen=True, kw_only=True)
class _Item:
    inputs: ModelInputs
    labels_T: torch.Tensor
    supervised_rows_M: torch.Tensor


def step_loss(engine: Engine, batches: Sequence[Batch]) -> torch.Tensor:
    """(summed cross-entropy, supervised tokens) of one step over all ranks, fp64 [2], the same on every rank.

    The model sees every visual token: nothing is masked or replaced, whatever the objective.
    """
    topology = engine.topology
    lengths = [num_student_rows(batch, False, engine.config.data.pad_to_multiple) for batch in batches]
    rows = even_rows(lengths, engine)
    items = [_item(batch, num_rows, engine) for batch, num_rows in zip(batches, rows, strict=True)]

    def forward_step(data: Iterator[_Item], model: torch.nn.Module) -> tuple[Any, Callable[..., Any]]:
        item = next(data)

        def collect(output: ModelOutput, non_loss_data: bool) -> torch.Tensor:
            return next_token_sum(
                output,
                item.labels_T,
                item.supervised_rows_M,
                vocab_size=engine.vocab_size,
                tp_group=topology.tp_group,
                share=(topology.cp_rank, topology.cp_size),
                impl=engine.config.train.kernels,
            ).double()

        return model(item.inputs), collect

    with evaluation_mode(engine.chunks):
        collected = run_pipeline(engine, items, rows, forward_step, forward_only=True)
    total = torch.stack(collected).sum() if collected else torch.zeros((), dtype=torch.float64)
    both = torch.stack([total.to(topology.device), total.new_zeros(()).to(topology.device)])
    dist.all_reduce(both, group=topology.dp_cp_group)
    if topology.pp_size > 1:
        dist.broadcast(both, group=topology.pp_group, group_src=topology.pp_size - 1)
    count = torch.tensor(float(sum(len(b.supervised_rows_M) for b in batches)), dtype=torch.float64)
    both[1] = count.to(topology.device)
    dist.all_reduce(both[1:], group=topology.dp_group)
    return both


def _item(batch: Batch, num_rows: int, engine: Engine) -> _Item:
    device = engine.topology.device
    return _Item(
        inputs=model_inputs(
            batch, num_rows, geometry=engine.geometry, num_shares=engine.topology.num_shares, device=device
        ),
        labels_T=send(batch.labels_T, device),
        supervised_rows_M=send(batch.supervised_rows_M, device),
    )


def held_out_loss(engine: Engine, data: DialogueData, exchange: Exchange, num_steps: int) -> float | None:
    """Mean cross-entropy of the supervised tokens of the first `num_steps` steps; None where there are none.

    All ranks take part and get the same number.
    """
    with held_out_steps(engine, data, exchange, num_steps) as steps:
        loss, count = sum(step_loss(engine, batches) for batches in steps).tolist()  # type: ignore[union-attr]
    return loss / count if count else None


@contextlib.contextmanager
def held_out_steps(
    engine: Engine, data: DialogueData, exchange: Exchange, num_steps: int
) -> Iterator[Iterator[list[Batch]]]:
    """This rank's micro-batches of the first `num_steps` steps of held-out rows, for whole weights."""
    topology, train = engine.topology, engine.config.train
    if engine.config.parallel.overlap_param_gather:
        for wrapped in engine.models:
            wrapped.start_param_sync(force_sync=True)
    steps = data.iterate(
        0,
        num_steps,
        exchange=exchange.reopened(),
        global_batch_size=train.global_batch_size,
        micro_batch_size=train.micro_batch_size,
        dp_rank=topology.dp_rank,
        dp_size=topology.dp_size,
        image_share=(topology.share, topology.num_shares) if topology.on_first_stage else None,
    )
    with contextlib.closing(steps):
        yield steps
