"""The engine against transformers on the same weights: logits, loss, and every layer's output.

Prompts are random token ids with images of random pixels in their places, so no data set and no tokenizer is
needed. Shapes: T tokens of all prompts, V vocabulary, D width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from laver_mcore.convert.probe import Probe, probe
from laver_mcore.convert.reference import LayerOutputs
from laver_mcore.data.sequence.batch import Batch, collate
from laver_mcore.data.sequence.prompt import IGNORE, EncodedSample, ImageSpan
from laver_mcore.model.network import Network


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """Token ids and, where it has images, what both models read of them: pixels of this prompt and its
    grids.
    """

    sample: EncodedSample
    pixels: torch.Tensor | None


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Largest absolute difference, beside the largest magnitude of the reference."""

    difference: float
    magnitude: float

    @property
    def relative(self) -> float:
        """The difference in units of the magnitude: fp32 rounds by a share of a number, and widths add to it."""
        return self.difference / (self.magnitude or 1.0)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One batch: `layers[i]` is the output of decoder layer i (from 0), the last entry before the final
    norm.
    """

    name: str
    logits: Difference
    layers: tuple[Difference, ...]
    engine_loss: float
    reference_loss: float

    def first_divergent_layer(self, tolerance: float) -> int | None:
        """The first decoder layer (from 0) whose relative difference is above `tolerance`."""
        above = [i for i, layer in enumerate(self.layers) if not layer.relative <= tolerance]
        return above[0] if above else None

    def passes(self, tolerance: float) -> bool:
        """Whether logits agree to `tolerance` of the largest; a difference that is not a number does not."""
        return self.logits.relative <= tolerance and abs(self.engine_loss - self.reference_loss) <= tolerance


def text_prompts(vocab_size: int, lengths: Sequence[int], seed: int = 0) -> list[Prompt]:
    """Prompts of random tokens."""
    rng = np.random.default_rng(seed)
    return [
        Prompt(sample=_sample(rng.integers(0, vocab_size, length), ()), pixels=None) for length in lengths
    ]


def image_prompt(
    vocab_size: int, image_token: int, grids: Sequence[tuple[int, int]], pixels: torch.Tensor, seed: int = 0
) -> Prompt:
    """A prompt of random tokens with an image of each grid in between, `pixels` being those of all its
    images.
    """
    rng = np.random.default_rng(seed)
    parts: list[np.ndarray] = []
    spans = []
    for rows, columns in grids:
        parts.append(_words(rng, vocab_size, image_token))
        spans.append(ImageSpan(sum(map(len, parts)), rows, columns))
        parts.append(np.full(rows * columns, image_token))
    parts.append(_words(rng, vocab_size, image_token))
    return Prompt(sample=_sample(np.concatenate(parts), tuple(spans)), pixels=pixels)


def _words(rng: np.random.Generator, vocab_size: int, image_token: int) -> np.ndarray:
    ids = rng.integers(0, vocab_size - 1, 5)
    return ids + (ids >= image_token)  # any token but the image's


def _sample(ids: np.ndarray, spans: tuple[ImageSpan, ...]) -> EncodedSample:
    ids_L = ids.astype(np.int32)
    return EncodedSample(
        token_ids_L=ids_L, labels_L=np.append(ids_L[1:], np.int32(IGNORE)), image_spans=spans
    )


def engine_probe(
    network: Network, prompts: Sequence[Prompt], pixels: torch.Tensor | None
) -> tuple[Probe, Batch]:
    """Run the packed prompts through the engine; `pixels` are those of this rank's share of all images."""
    samples = [prompt.sample for prompt in prompts]
    total = sum(len(sample) for sample in samples)
    batch = collate(samples, [""] * len(samples), total_length=total, pad_id=0, pixels=pixels)
    seen = probe(network.chunks, batch, network.geometry, network.topology, network.vocab_size)
    return seen, batch


@torch.no_grad()
def compare(name: str, seen: Probe, batch: Batch, model: Any, prompts: Sequence[Prompt]) -> Comparison:
    """Run each prompt by itself through the transformers `model` and hold the engine's `seen` against it."""
    logits, layers = [], []
    for prompt in prompts:
        ids_L = torch.from_numpy(prompt.sample.token_ids_L.astype(np.int64))
        inputs: dict[str, Any] = dict(input_ids=ids_L[None])
        if prompt.pixels is not None:
            grids = [(span.height, span.width) for span in prompt.sample.image_spans]
            inputs |= dict(pixel_values=prompt.pixels, image_grids=torch.tensor(grids))
        with LayerOutputs(model.model.layers) as outputs:
            logits.append(model(**inputs).logits[0].float())
        layers.append([output[0].float() for output in outputs])
    wanted_TV = torch.cat(logits)
    return Comparison(
        name=name,
        logits=_difference(seen.logits_TV, wanted_TV),
        layers=tuple(
            _difference(seen.layers[i], torch.cat([each[i] for each in layers]))
            for i in range(len(seen.layers))
        ),
        engine_loss=float(F.cross_entropy(seen.logits_TV, batch.labels_T, ignore_index=IGNORE)),
        reference_loss=float(F.cross_entropy(wanted_TV, batch.labels_T, ignore_index=IGNORE)),
    )


def _difference(got: torch.Tensor, wanted: torch.Tensor) -> Difference:
    return Difference(difference=float((got - wanted).abs().max()), magnitude=float(wanted.abs().max()))


def report(comparisons: Sequence[Comparison], tolerance: float, facts: dict[str, Any]) -> str:
    """Markdown to attach to an issue: what was compared, differences per batch and layer, the verdict."""
    lines = ["# Parity with transformers", "", *(f"- {name}: {value}" for name, value in facts.items()), ""]
    for each in comparisons:
        verdict = "agree" if each.passes(tolerance) else "DIFFER"
        lines += [
            f"## {each.name}: {verdict} (tolerance {tolerance:g})",
            "",
            f"- logits: largest difference {each.logits.difference:.3e} of {each.logits.magnitude:.3g} "
            f"({each.logits.relative:.3e})",
            f"- loss: engine {each.engine_loss:.6f}, transformers {each.reference_loss:.6f}",
        ]
        first = each.first_divergent_layer(tolerance)
        lines += [f"- first divergent layer: {'none' if first is None else first}", ""]
        lines += ["| layer | largest difference | magnitude | relative |", "|---:|---:|---:|---:|"]
        lines += [
            f"| {i} | {layer.difference:.3e} | {layer.magnitude:.3g} | {layer.relative:.3e} |"
            for i, layer in enumerate(each.layers)
        ]
        lines.append("")
    return "\n".join(lines)
