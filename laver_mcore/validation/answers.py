"""Greedy answers to the questions of held-out dialogues, and how many of them are right."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from PIL import Image
from tqdm import tqdm

from laver_mcore import generate as generation
from laver_mcore.data.errors import DataError
from laver_mcore.data.images.decode import open_image
from laver_mcore.data.images.processors import ImageProcessor
from laver_mcore.data.records.sample import Sample, Turn
from laver_mcore.data.sequence.batch import Batch, collate
from laver_mcore.data.sequence.prompt import encode_prompt
from laver_mcore.data.sequence.tokenizer import Tokenizer
from laver_mcore.model.network import Network


@dataclass(frozen=True, kw_only=True)
class Reader:
    """What turns dialogues into prompts, and answers into text."""

    tokenizer: Tokenizer
    processor: ImageProcessor | None
    batch_size: int = 64
    """Questions answered together."""
    max_new_tokens: int = 32
    """Longest answer."""

    def batch(
        self,
        questions: Sequence[Turn],
        images: Sequence[Image.Image],
        *,
        keys: Sequence[str],
        system_prompt: str,
    ) -> Batch:
        """A question about each picture, packed into one row."""
        assert self.processor is not None
        prompts = [
            encode_prompt(
                [turn], [self.processor.grid(*image.size)], self.tokenizer, system_prompt=system_prompt
            )
            for turn, image in zip(questions, images, strict=True)
        ]
        pixels = self.processor(images)
        length = sum(map(len, prompts))
        return collate(prompts, keys, total_length=length, pad_id=self.tokenizer.special.pad, pixels=pixels)


def questions_of(samples: Sequence[Sample]) -> list[tuple[Sample, int]]:
    """(dialogue, number of the turn that answers) of every question, in order."""
    return [
        (sample, index)
        for sample in samples
        for index, turn in enumerate(sample.turns)
        if turn.role == "assistant"
    ]


def answer(
    questions: Sequence[tuple[Sample, int]], network: Network, reader: Reader, *, speaks: bool = False
) -> list[dict[str, Any]]:
    """One row per question, in order: key, image, question, expected, answer; `error` where an image is broken.

    Each is answered by itself, after the right answers to the ones before it. All ranks of a model replica take part
    and get the same rows; one that `speaks` shows its progress on a terminal.
    """
    rows = []
    starts = range(0, len(questions), reader.batch_size)
    for start in tqdm(starts, disable=None if speaks else True, unit="batch"):
        rows += _answer_together(questions[start : start + reader.batch_size], network, reader)
    return rows


def _answer_together(
    questions: Sequence[tuple[Sample, int]], network: Network, reader: Reader
) -> list[dict[str, Any]]:
    """Rows of one batch; a question whose images cannot be read has `error` and no answer, and the others go on."""
    prompts, images, errors = [], [], []
    for sample, index in questions:
        try:
            # Every rank reads the same files, so all leave out the same questions.
            opened = [open_image(path) for path in sample.images]
            grids = [reader.processor.grid(*image.size) for image in opened] if reader.processor else []
        except DataError as error:
            errors.append(str(error))
            continue
        errors.append("")
        system = network.config.data.system_prompt
        prompts.append(encode_prompt(sample.turns[:index], grids, reader.tokenizer, system_prompt=system))
        images.extend(opened)
    answers = iter(
        generation.generate(
            network,
            prompts,
            images,
            reader.processor,
            stop_token=reader.tokenizer.special.end_of_turn,
            max_new_tokens=reader.max_new_tokens,
        )
        if prompts
        else ()
    )
    rows = []
    for (sample, index), why in zip(questions, errors, strict=True):
        answered = "" if why else reader.tokenizer.decode(next(answers)).strip()
        row = {
            "key": sample.key,
            "image": str(sample.images[0]) if sample.images else None,
            "question": sample.turns[index - 1].text.replace("<image>", "").strip(),
            "expected": sample.turns[index].text.strip(),
            "answer": answered,
        }
        rows.append(row | {"error": why} if why else row)
    return rows


def accuracy(questions: Sequence[tuple[Sample, int]], network: Network, reader: Reader) -> float:
    """Share of the questions that are answered word for word; data-parallel replicas share them out."""
    topology = network.topology
    mine = questions[topology.dp_rank :: topology.dp_size]
    right = sum(
        "error" not in row and row["answer"] == row["expected"] for row in answer(mine, network, reader)
    )
    counts = torch.tensor([float(right), float(len(mine))], dtype=torch.float64).to(topology.device)
    dist.all_reduce(counts, group=topology.dp_group)
    right, total = counts.tolist()
    return right / max(total, 1)
