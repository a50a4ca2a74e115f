"""Greedy answers from the engine itself, under any parallel layout.

Every new token is a forward pass over the whole packed prompts: no cache to keep right. It serves evaluation during
training and as the oracle for exported models; serving is for the exported model.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region
from PIL import Image

from laver_mcore.data.images.processors import ImageProcessor
from laver_mcore.data.order.balance import image_shares
from laver_mcore.data.sequence.batch import collate
from laver_mcore.data.sequence.prompt import IGNORE, EncodedSample
from laver_mcore.model.inputs import ModelInputs, model_inputs, round_up
from laver_mcore.model.method import ModelOutput
from laver_mcore.model.network import Network
from laver_mcore.model.vision_language import VisionLanguageModel
from laver_mcore.train.pipeline import run_pipeline


@contextlib.contextmanager
def evaluation_mode(chunks: Sequence[VisionLanguageModel]) -> Iterator[None]:
    """Inside, the model is in evaluation mode and nothing has gradients."""
    was_training = [chunk.training for chunk in chunks]
    try:
        for chunk in chunks:
            chunk.eval()
        with torch.no_grad():
            yield
    finally:
        for chunk, training in zip(chunks, was_training, strict=True):
            chunk.train(training)


def _extended(sample: EncodedSample, answer: list[int]) -> EncodedSample:
    tokens_L = np.concatenate([sample.token_ids_L, np.array(answer, dtype=np.int32)])
    return EncodedSample(
        token_ids_L=tokens_L, labels_L=np.full_like(tokens_L, IGNORE), image_spans=sample.image_spans
    )


def _next_tokens(output: ModelOutput, rows_P: torch.Tensor, vocab_size: int, tp_group: Any) -> torch.Tensor:
    """Most likely next token at each row, int64 [P], the same on every tensor-parallel rank."""
    logits_PV = output.dialogue_TD.index_select(0, rows_P) @ output.output_weight_VD.T
    whole_PV = gather_from_tensor_model_parallel_region(logits_PV, group=tp_group)
    return whole_PV[:, :vocab_size].float().argmax(-1)


def _features(
    images: Sequence[Image.Image], network: Network, processor: ImageProcessor | None
) -> torch.Tensor | None:
    """This rank's share of the prompts' images, encoded once for all new tokens."""
    topology = network.topology
    if processor is None or not topology.on_first_stage:
        return None
    grids = [processor.grid(*image.size) for image in images]
    start, stop = image_shares(grids, topology.num_shares)[topology.share]
    pixels = processor(images[start:stop]).to(topology.device)
    return network.chunks[0].encode_images(pixels, grids[start:stop])


def generate(
    network: Network,
    prompts: Sequence[EncodedSample],
    images: Sequence[Image.Image],
    processor: ImageProcessor | None,
    *,
    stop_token: int,
    max_new_tokens: int = 32,
) -> list[list[int]]:
    """Greedy continuations of `prompts`, without `stop_token`; `images` are those of all prompts in order.

    All ranks call it with the same arguments and get the same answers.
    """
    topology = network.topology
    answers: list[list[int]] = [[] for _ in prompts]
    finished = np.zeros(len(prompts), dtype=bool)
    with evaluation_mode(network.chunks):
        features = _features(images, network, processor)
        for _ in range(max_new_tokens):
            samples = [_extended(p, a) for p, a in zip(prompts, answers, strict=True)]
            tokens_P = _forward(network, samples, features)
            if topology.pp_size > 1:
                dist.broadcast(tokens_P, group=topology.pp_group, group_src=topology.pp_size - 1)
            for index, token in enumerate(tokens_P.tolist()):
                finished[index] |= token == stop_token
                if not finished[index]:
                    answers[index].append(token)
            if finished.all():
                break
    return answers


def _forward(network: Network, samples: list[EncodedSample], features: torch.Tensor | None) -> torch.Tensor:
    """One pass over packed `samples`; the next token of each on the last stage, zeros elsewhere."""
    topology = network.topology
    lengths = np.array([len(sample) for sample in samples])
    total = round_up(int(lengths.sum()), network.config.data.pad_to_multiple)
    batch = collate(samples, [""] * len(samples), total_length=total, pad_id=0)
    inputs = model_inputs(
        batch,
        total,
        geometry=network.geometry,
        num_shares=topology.num_shares,
        device=topology.device,
        features=features,
    )
    rows_P = torch.from_numpy(lengths.cumsum() - 1).to(topology.device)

    def step(data: Iterator[ModelInputs], model: torch.nn.Module) -> tuple[Any, Any]:
        def collect(output: ModelOutput, non_loss_data: bool) -> torch.Tensor:
            return _next_tokens(output, rows_P, network.vocab_size, topology.tp_group)

        return model(next(data)), collect

    # The interleaved schedule wants a micro-batch for every stage; the answers of all but the first are thrown away.
    copies = topology.pp_size if topology.num_chunks > 1 else 1
    collected = run_pipeline(network, [inputs] * copies, [total] * copies, step, forward_only=True)
    if collected:
        return collected[0]
    return torch.zeros(len(samples), dtype=torch.int64, device=topology.device)
