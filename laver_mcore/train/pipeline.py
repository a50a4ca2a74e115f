"""Run micro-batches through Megatron's pipeline schedule, whatever the layout."""

from collections.abc import Callable, Sequence
from typing import Any

from megatron.core.pipeline_parallel import get_forward_backward_func

from laver_mcore.megatron.known_shapes import known_shapes
from laver_mcore.model.network import Network


def run_pipeline(
    network: Network,
    items: Sequence[Any],
    rows: Sequence[int],
    step: Callable[..., Any],
    *,
    forward_only: bool,
) -> list[Any]:
    """Megatron's schedule for this layout over `items` of so many `rows`; returns what the last stage collected.

    `step(iterator, model)` is Megatron's forward step; with `forward_only` its second result is called as
    `f(output, non_loss_data=True)` and what it returns is collected.
    """
    interleaved = network.topology.num_chunks > 1
    staged = network.topology.pp_size > 1 and not interleaved
    models: Any = network.models if interleaved else network.models[0]
    iterators = [iter(items) for _ in network.models]
    return get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=iterators if interleaved else iterators[0],
        model=models,
        num_microbatches=len(items),
        seq_length=max(rows),  # used by the interleaved schedule alone
        micro_batch_size=1,
        forward_only=forward_only,
        collect_non_loss_data=forward_only,
        **(known_shapes(network.chunks[0].config, rows) if staged else {}),
    )


def even_rows(rows: list[int], network: Network) -> list[int]:
    """Lengths of a step's micro-batches: their own, or all the longest under the interleaved schedule."""
    return [max(rows)] * len(rows) if network.topology.num_chunks > 1 else rows
