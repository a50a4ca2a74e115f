"""Reading an exported model: states and attention of every layer on a dialogue, answers on changed pictures."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image

from laver_mcore.convert.reference import LayerOutputs
from laver_mcore.diagnose import measures

_NAME = "laver_diagnose"


@dataclass(frozen=True, kw_only=True)
class Question:
    """One picture, a question about it and the right answer."""

    image: Image.Image
    question: str
    answer: str


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What each layer made of one question with its right answer; the lists go over layers."""

    grid: tuple[int, int]
    visual: list[torch.Tensor] = field(default_factory=list)
    """States of the visual tokens, [N, D]."""
    text: list[torch.Tensor] = field(default_factory=list)
    """States of the other tokens."""
    share: list[torch.Tensor] = field(default_factory=list)
    """Share of the answer's attention on visual tokens, mean over its tokens, [H]."""
    entropy: list[torch.Tensor] = field(default_factory=list)
    """Spatial entropy of the answer's attention over the picture, likewise, [H]."""
    maps: list[torch.Tensor] = field(default_factory=list)
    """Attention of the answer's first token over the picture, mean over heads, [N]."""


def _inputs(processor: Any, question: str, image: Image.Image | None) -> dict[str, torch.Tensor]:
    parts: list[dict[str, str]] = [{"type": "text", "text": question}]
    if image is not None:
        parts.insert(0, {"type": "image"})
    text = processor.apply_chat_template([{"role": "user", "content": parts}], add_generation_prompt=True)
    return dict(processor(text=text, images=[] if image is None else [image]))


@contextlib.contextmanager
def _attention(decoder: Any, seen: Any) -> Iterator[None]:
    """Inside, `seen(query [H, L, C], key [H, L, C], scale)` is called in every layer of `decoder`."""
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    def attend(module: Any, query: Any, key: Any, value: Any, mask: Any, **kwargs: Any) -> Any:
        scale = kwargs.get("scaling") or query.shape[-1] ** -0.5
        seen(query[0], key[0].repeat_interleave(query.shape[1] // key.shape[1], 0), scale)
        return sdpa_attention_forward(module, query, key, value, mask, **kwargs)

    AttentionInterface.register(_NAME, attend)
    before = decoder.config._attn_implementation
    decoder.config._attn_implementation = _NAME
    try:
        yield
    finally:
        decoder.config._attn_implementation = before


@torch.no_grad()
def read(model: Any, processor: Any, question: Question) -> Reading:
    """One forward pass over the question and its right answer."""
    inputs = _inputs(processor, question.question, question.image)
    answer = processor.tokenizer(question.answer, add_special_tokens=False, return_tensors="pt")["input_ids"]
    prompt = inputs["input_ids"]
    inputs["input_ids"] = torch.cat([prompt, answer], 1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    is_visual = inputs["input_ids"][0] == model.config.image_token_id
    places = torch.arange(prompt.shape[1], inputs["input_ids"].shape[1])
    rows, columns = inputs["image_grids"][0].tolist()
    reading = Reading(grid=(rows, columns))

    def seen(query: torch.Tensor, key: torch.Tensor, scale: float) -> None:
        share = measures.attention_share(query[:, places], key, places, is_visual, scale)
        over = measures.image_attention(query[:, places], key[:, is_visual], scale)
        reading.share.append(share.mean(1))
        reading.entropy.append(measures.spatial_entropy(over).mean(1))
        reading.maps.append(over[:, 0].mean(0))

    with LayerOutputs(model.model.layers) as outputs, _attention(model.model, seen):
        model(**inputs, use_cache=False)
    for output in outputs:
        reading.visual.append(output[0, is_visual].float())
        reading.text.append(output[0, ~is_visual].float())
    return reading


def cells(image: Image.Image, grid: tuple[int, int]) -> np.ndarray:
    """The picture cut into its tokens' places, row by row: uint8 [N, height, width, 3]."""
    rows, columns = grid
    height, width = max(1, image.height // rows), max(1, image.width // columns)
    pixels = np.asarray(image.convert("RGB").resize((columns * width, rows * height)))
    return (
        pixels.reshape(rows, height, columns, width, 3).transpose(0, 2, 1, 3, 4).reshape(-1, height, width, 3)
    )


def from_cells(cells_NHWC: np.ndarray, grid: tuple[int, int]) -> Image.Image:
    """The picture that `cells` cut."""
    rows, columns = grid
    _, height, width, _ = cells_NHWC.shape
    whole = cells_NHWC.reshape(rows, columns, height, width, 3).transpose(0, 2, 1, 3, 4)
    return Image.fromarray(np.ascontiguousarray(whole.reshape(rows * height, columns * width, 3)))


def shuffled(image: Image.Image, grid: tuple[int, int], seed: int) -> Image.Image:
    """The picture with its tokens' places exchanged at random."""
    cut = cells(image, grid)
    return from_cells(cut[np.random.default_rng(seed).permutation(len(cut))], grid)


@torch.no_grad()
def accuracies(
    model: Any, processor: Any, questions: Sequence[Question], grids: Sequence[tuple[int, int]]
) -> dict[str, float]:
    """Share of right words, each at its place: pictures as they are, shuffled, swapped with the next, removed."""
    images = [question.image for question in questions]
    changed: dict[str, Sequence[Image.Image | None]] = {
        "as it is": images,
        "shuffled": [
            shuffled(image, grid, i) for i, (image, grid) in enumerate(zip(images, grids, strict=True))
        ],
        "swapped": [*images[1:], images[0]],
        "removed": [None] * len(images),
    }
    return {
        name: float(
            np.mean([_score(model, processor, q, image) for q, image in zip(questions, given, strict=True)])
        )
        for name, given in changed.items()
    }


def _score(model: Any, processor: Any, question: Question, image: Image.Image | None) -> float:
    inputs = _inputs(processor, question.question, image)
    wanted = question.answer.split()
    length = len(processor.tokenizer(question.answer, add_special_tokens=False)["input_ids"]) + 1
    new = model.generate(**inputs, max_new_tokens=length, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    got = processor.tokenizer.decode(new, skip_special_tokens=True).split()
    return sum(a == b for a, b in zip(wanted, got, strict=False)) / len(wanted)


def table(readings: Sequence[Reading]) -> list[dict[str, float]]:
    """One row per layer, from 1: means over the questions; the share also per head."""
    rows = []
    for layer in range(len(readings[0].visual)):
        share_H = torch.stack([reading.share[layer] for reading in readings]).mean(0)
        row = {
            "layer": layer + 1.0,
            "visual_similarity": float(np.mean([measures.similarity(r.visual[layer]) for r in readings])),
            "effective_rank": float(np.mean([measures.effective_rank(r.visual[layer]) for r in readings])),
            "visual_attention": float(share_H.mean()),
            "spatial_entropy": float(np.mean([float(r.entropy[layer].mean()) for r in readings])),
        }
        rows.append(row | {f"head_{head}": value for head, value in enumerate(share_H.tolist())})
    return rows
