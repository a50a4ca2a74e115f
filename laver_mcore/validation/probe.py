"""What the decoder's layers make of held-out pictures, in a few numbers, while a run trains.

Shapes: T rows of a micro-batch's pass, D width, H heads, G key/value heads, C width of a head.
"""

import contextlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from laver_kernels import rotate
from laver_mcore.data.sequence.batch import Batch
from laver_mcore.data.serve.exchange import Exchange
from laver_mcore.data.serve.loader import DialogueData
from laver_mcore.diagnose import measures
from laver_mcore.model.context_parallel import rows_to_heads
from laver_mcore.objectives.similarity import num_similar_images, similarity_sum
from laver_mcore.train.checkpoint import Progress
from laver_mcore.train.engine import Engine
from laver_mcore.validation.loss import held_out_steps, step_loss

_COLUMNS = 5
"""Of a layer: sums of similarity and effective rank, images; sum of shares, heads x answer tokens."""


@dataclass(frozen=True, kw_only=True)
class Probe:
    """Similarity, effective rank and attention on visual tokens, by layer, of the first step of held-out rows."""

    engine: Engine
    data: DialogueData
    exchange: Exchange

    def due(self, iteration: int, *, exiting: bool) -> bool:
        """Whether the run is probed after this iteration, counted from 1."""
        interval = self.engine.config.validation.probe_interval
        return interval is not None and (exiting or iteration % interval == 0)

    def __call__(self, progress: Progress) -> dict[str, float | None]:
        """Entries for the metrics, the same on all ranks, null where the rows have no picture or no answer."""
        with held_out_steps(self.engine, self.data, self.exchange, 1) as steps:
            (batches,) = steps
            taps = _Taps(self.engine, batches)
            with taps:
                step_loss(self.engine, batches)
        dist.all_reduce(taps.sums_LX)  # of heads, replicas and stages: each adds what it alone has seen
        found: dict[str, float | None] = {}
        for layer, row in enumerate(taps.sums_LX.tolist(), start=1):
            similarity, rank, images, share, answers = row
            found[f"probe_similarity_{layer}"] = similarity / images if images else None
            found[f"probe_rank_{layer}"] = rank / images if images else None
            found[f"probe_visual_attention_{layer}"] = share / answers if answers else None
        return found


@dataclass
class _Taps:
    """Inside, every layer's output and every layer's queries and keys are measured as they pass by."""

    engine: Engine
    batches: Sequence[Batch]
    sums_LX: torch.Tensor = field(init=False)
    _stack: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)
    _seen: Counter[Any] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        layers, device = self.engine.config.model.num_layers, self.engine.topology.device
        assert layers is not None
        self.sums_LX = torch.zeros(layers, _COLUMNS, dtype=torch.float64, device=device)

    def __enter__(self) -> None:
        for chunk in self.engine.chunks:
            layers: Any = chunk.decoder.layers
            for layer in layers:
                states = layer.register_forward_hook(self._states(chunk))
                attention = layer.self_attention.core_attention.register_forward_pre_hook(
                    self._attention(layer.layer_number), with_kwargs=True
                )
                self._stack.callback(states.remove)
                self._stack.callback(attention.remove)

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _next(self, module: Any) -> Batch:
        """The micro-batch that passes a module: each passes all modules in order."""
        self._seen[module] += 1
        return self.batches[self._seen[module] - 1]

    def _states(self, chunk: Any) -> Any:
        @torch.no_grad()
        def seen(layer: Any, _: Any, output: Any) -> None:
            batch, topology = self._next(layer), self.engine.topology
            hidden_TD = chunk.whole(output[0] if isinstance(output, tuple) else output)
            # The same on all ranks that share these rows: one adds it.
            if topology.share == 0 and len(batch.visual_rows_N):
                visual_ND = hidden_TD[batch.visual_rows_N.to(topology.device)]
                rank = sum(map(measures.effective_rank, visual_ND.split(batch.image_lengths)))
                row = self.sums_LX[layer.layer_number - 1]
                row[0] += similarity_sum(visual_ND, batch.image_lengths)
                row[1] += rank
                row[2] += num_similar_images(batch.image_lengths)

        return seen

    def _attention(self, number: int) -> Any:
        @torch.no_grad()
        def seen(module: Any, args: Any, kwargs: Any) -> None:
            batch, packed = self._next(module), kwargs["packed_seq_params"]
            query_THC, key_TGC, value_TGC = args[:3]
            if module.cp_group.size() > 1:
                query_THC, key_TGC, _ = rows_to_heads(query_THC, key_TGC, value_TGC, module.cp_group)
            if packed.rope is not None:
                query_THC, key_TGC = (rotate(x, *packed.rope) for x in (query_THC, key_TGC))
            for query, key, place, chosen in _answers(batch, query_THC, key_TGC):
                share_HQ = measures.attention_share(query, key, place, chosen, query.shape[-1] ** -0.5)
                self.sums_LX[number - 1, 3] += share_HQ.sum()
                self.sums_LX[number - 1, 4] += share_HQ.numel()

        return seen


def _answers(
    batch: Batch, query_THC: torch.Tensor, key_TGC: torch.Tensor
) -> Iterator[tuple[torch.Tensor, ...]]:
    """Of each dialogue with pictures: answers' queries [H, Q, C], keys [H, K, C], the queries' places, visual keys."""
    start, device = 0, query_THC.device
    for length in batch.document_lengths:
        inside = slice(start, start + length)
        places = [
            rows[(rows >= start) & (rows < start + length)] - start
            for rows in (batch.supervised_rows_M, batch.visual_rows_N)
        ]
        place, visual = (rows.to(device) for rows in places)
        if len(place) and len(visual):
            chosen = torch.zeros(length, dtype=torch.bool, device=device).index_fill(0, visual, True)
            key_HKC = (
                key_TGC[inside].repeat_interleave(query_THC.shape[1] // key_TGC.shape[1], 1).transpose(0, 1)
            )
            yield query_THC[inside][place].transpose(0, 1), key_HKC, place, chosen
        start += length
