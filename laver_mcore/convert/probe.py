"""One forward pass under any parallel layout, with logits and every layer's output brought to all ranks.

For comparing the engine with another implementation on small batches: everything is gathered whole, in fp32.
Shapes: S rows of the pass, T dialogue rows, D width, V vocabulary (unpadded).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from laver_mcore.data.sequence.batch import Batch, collate
from laver_mcore.data.sequence.prompt import IGNORE, EncodedSample
from laver_mcore.megatron.parallel import Topology
from laver_mcore.model.inputs import AttentionGeometry, ModelInputs, model_inputs, round_up
from laver_mcore.model.method import ModelOutput
from laver_mcore.model.vision_language import VisionLanguageModel


@dataclass(frozen=True, kw_only=True)
class Probe:
    """`logits_TV` of the dialogue, and `layers[i]` the output [T, D] of decoder layer i (counted from 0)."""

    logits_TV: torch.Tensor
    layers: dict[int, torch.Tensor]


def text_batch(documents: Sequence[Sequence[int]], total_length: int, pad_id: int = 0) -> Batch:
    """Token ids of several documents, packed into one row, every token but the last of each supervised."""
    samples = []
    for document in documents:
        ids_L = np.asarray(document, dtype=np.int32)
        samples.append(
            EncodedSample(token_ids_L=ids_L, labels_L=np.append(ids_L[1:], np.int32(IGNORE)), image_spans=())
        )
    keys = [f"document-{index}" for index in range(len(samples))]
    return collate(samples, keys, total_length=total_length, pad_id=pad_id)


def probe(
    chunks: list[VisionLanguageModel],
    batch: Batch,
    geometry: AttentionGeometry,
    topology: Topology,
    vocab_size: int,
) -> Probe:
    """Run `batch` through all stages without gradients; all ranks take part and receive the same `Probe`."""
    num_rows = round_up(len(batch.tokens_T), topology.tp_size)
    inputs = model_inputs(
        batch, num_rows, geometry=geometry, num_shares=topology.num_shares, device=topology.device
    )
    captured: dict[int, torch.Tensor] = {}
    hooks = [_capture(layer, captured) for chunk in chunks for layer in chunk.decoder.layers]  # type: ignore[union-attr]
    training = [chunk.training for chunk in chunks]
    try:
        for chunk in chunks:
            chunk.eval()
        with torch.no_grad():
            output = _pipeline(chunks, inputs, topology)
    finally:
        for hook in hooks:
            hook.remove()
        for chunk, was_training in zip(chunks, training, strict=True):
            chunk.train(was_training)
    num_dialogue = inputs.num_dialogue
    mine = {
        layer: _whole_rows(hidden, chunks[0].config.sequence_parallel, topology)[:num_dialogue].float().cpu()
        for layer, hidden in captured.items()
    }
    logits_TV = None if output is None else gather_logits(output, topology, vocab_size).float().cpu()
    return _to_all(mine, logits_TV, topology)


def gather_logits(output: ModelOutput, topology: Topology, vocab_size: int) -> torch.Tensor:
    """Logits [T, V] of the dialogue from all ranks' shards of the vocabulary; no gradient across ranks."""
    shard_TV = output.dialogue_TD @ output.output_weight_VD.T
    if topology.tp_size == 1:
        return shard_TV[:, :vocab_size]
    shards = [torch.empty_like(shard_TV) for _ in range(topology.tp_size)]
    dist.all_gather(shards, shard_TV.contiguous(), group=topology.tp_group)
    return torch.cat(shards, dim=1)[:, :vocab_size]


def _pipeline(
    chunks: list[VisionLanguageModel], inputs: ModelInputs, topology: Topology
) -> ModelOutput | None:
    """Walk through the stages in order, hidden states sent from each to the next."""
    mcore = chunks[0].config
    rows = inputs.num_rows // (topology.tp_size if mcore.sequence_parallel else 1)
    last = topology.pp_size * len(chunks) - 1
    ring = dist.get_process_group_ranks(topology.pp_group)
    result: Any = None
    for virtual, chunk in enumerate(chunks):
        stage = virtual * topology.pp_size + topology.pp_rank
        if stage > 0 and topology.pp_size > 1:
            hidden = torch.empty(rows, 1, mcore.hidden_size, dtype=mcore.params_dtype, device=topology.device)
            dist.recv(hidden, src=ring[(topology.pp_rank - 1) % topology.pp_size], group=topology.pp_group)
            chunk.set_input_tensor([hidden])
        result = chunk(inputs)
        if stage < last:
            dist.send(
                result.contiguous(),
                dst=ring[(topology.pp_rank + 1) % topology.pp_size],
                group=topology.pp_group,
            )
    return result if isinstance(result, ModelOutput) else None


def _capture(layer: Any, captured: dict[int, torch.Tensor]) -> Any:
    def keep(module: Any, _: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        captured[module.layer_number - 1] = hidden[:, 0]

    return layer.register_forward_hook(keep)


def _whole_rows(hidden: torch.Tensor, sequence_parallel: bool, topology: Topology) -> torch.Tensor:
    if not sequence_parallel:
        return hidden
    parts = [torch.empty_like(hidden) for _ in range(topology.tp_size)]
    dist.all_gather(parts, hidden.contiguous(), group=topology.tp_group)
    return torch.cat(parts)


def _to_all(mine: dict[int, torch.Tensor], logits_TV: torch.Tensor | None, topology: Topology) -> Probe:
    gathered: list[Any] = [None] * topology.pp_size
    dist.all_gather_object(gathered, (mine, logits_TV), group=topology.pp_group)
    layers = {layer: hidden for part, _ in gathered for layer, hidden in part.items()}
    logits = next(logits for _, logits in gathered if logits is not None)
    return Probe(logits_TV=logits, layers=dict(sorted(layers.items())))
