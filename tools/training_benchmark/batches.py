"""Synthetic stage-2 data: one image and some text a sample, packed for this engine, padded for the released recipe.

    | question | image | question | answer: supervised |

Token ids, lengths and pixels are random functions of the seed, so that every arm makes the same ones for itself.
Shapes: B samples, L tokens of the longest, N visual tokens of all images.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch

from laver_mcore.data.order.packing import pack
from laver_mcore.data.sequence.batch import Batch, collate
from laver_mcore.data.sequence.masking import draw_mask
from laver_mcore.data.sequence.prompt import IGNORE, EncodedSample, ImageSpan
from tools.training_benchmark.setting import Setting

IMAGE_TOKEN = 0
PAD_TOKEN = 1
FIRST_WORD = 2
POOL = 8
"""Samples that packing chooses from, in global batches."""
PAD_MULTIPLE = 8
"""Padded samples are as long as the longest, rounded up to this, as trainers on transformers do."""


@dataclass(frozen=True, kw_only=True, eq=False)
class MicroBatch:
    """The samples of one micro-batch, in the order in which they are packed."""

    samples: tuple[EncodedSample, ...]
    keys: tuple[str, ...]
    pixels: torch.Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class PaddedBatch:
    """The same samples one to a row, padded on the right."""

    ids_BL: torch.Tensor
    labels_BL: torch.Tensor
    """Token ids to be learned at their own places, -100 elsewhere; the loss shifts them."""
    positions_3BL: torch.Tensor
    image_BL: torch.Tensor
    """Number of the image that a token belongs to, -1 for text."""
    is_real_BL: torch.Tensor
    masked_N: torch.Tensor
    pixels: torch.Tensor

    def to(self, device: torch.device) -> "PaddedBatch":
        moved: dict[str, Any] = {f.name: getattr(self, f.name).to(device) for f in fields(self)}
        return PaddedBatch(**moved)


def _sample(setting: Setting, vocab_size: int, draw: np.random.Generator) -> EncodedSample:
    half = setting.text_tokens // 2
    num_text = int(draw.integers(half, setting.text_tokens + half + 1))
    num_answer = max(1, round(num_text * setting.supervised_share))
    num_before = max(1, (num_text - num_answer) // 2)
    words = draw.integers(FIRST_WORD, vocab_size, num_text)
    image = np.full(setting.num_visual, IMAGE_TOKEN)
    ids_L = np.concatenate([words[:num_before], image, words[num_before:]]).astype(np.int32)
    labels_L = np.full(len(ids_L), IGNORE, dtype=np.int32)
    labels_L[-num_answer - 1 : -1] = ids_L[-num_answer:]
    side = int(setting.num_visual**0.5)
    return EncodedSample(
        token_ids_L=ids_L, labels_L=labels_L, image_spans=(ImageSpan(num_before, side, side),)
    )


def _pixels(setting: Setting, num_images: int, draw: np.random.Generator) -> torch.Tensor:
    shape: tuple[int, ...] = (num_images, 3, 384, 384)
    if setting.vision == "encoder-free":
        shape = (num_images * setting.num_visual, 3 * setting.patch_size**2)
    return torch.from_numpy(draw.standard_normal(shape, dtype=np.float32))


def global_batch(setting: Setting, vocab_size: int, number: int) -> list[MicroBatch]:
    """The micro-batches of global batch `number`: as many samples as its packed rows hold."""
    draw = np.random.default_rng((setting.seed, number))
    num_rows = setting.global_batch_size
    # Many more samples than these rows hold, so that packing has as much choice as it has in training.
    enough = POOL * num_rows * setting.seq_length // (setting.num_visual + setting.text_tokens) + POOL
    samples = [_sample(setting, vocab_size, draw) for _ in range(enough)]
    rows = pack([len(sample) for sample in samples], setting.seq_length)
    # Packing puts the longest samples first and what is left over last; in training rows are shuffled.
    rows = [rows[i] for i in draw.permutation(len(rows) - 1)[:num_rows]]
    micro_batches = []
    for start in range(0, num_rows, setting.micro_batch_size):
        members = [i for row in rows[start : start + setting.micro_batch_size] for i in row]
        micro_batches.append(
            MicroBatch(
                samples=tuple(samples[i] for i in members),
                keys=tuple(f"{number}/{i}" for i in members),
                pixels=_pixels(setting, len(members), draw),
            )
        )
    return micro_batches


def packed(batch: MicroBatch, setting: Setting) -> Batch:
    """What the engine trains on."""
    return collate(
        batch.samples,
        batch.keys,
        total_length=setting.micro_batch_size * setting.seq_length,
        pad_id=PAD_TOKEN,
        pixels=batch.pixels,
    )


def padded_length(batch: MicroBatch) -> int:
    """Tokens of every row of the padded batch."""
    longest = max(len(sample) for sample in batch.samples)
    return -(-longest // PAD_MULTIPLE) * PAD_MULTIPLE


def padded(batch: MicroBatch, setting: Setting, iteration: int) -> PaddedBatch:
    """What the released recipe trains on; visual tokens are masked as the engine masks them at `iteration`."""
    shape = (len(batch.samples), padded_length(batch))
    ids_BL, labels_BL = np.full(shape, PAD_TOKEN, dtype=np.int64), np.full(shape, IGNORE, dtype=np.int64)
    image_BL, is_real_BL = np.full(shape, -1), np.zeros(shape, dtype=bool)
    positions_3BL = np.zeros((3, *shape), dtype=np.int64)
    for row, sample in enumerate(batch.samples):
        length = len(sample)
        ids_BL[row, :length] = sample.token_ids_L
        labels_BL[row, 1:length] = sample.labels_L[:-1]
        is_real_BL[row, :length] = True
        (span,) = sample.image_spans
        image_BL[row, span.start : span.stop] = row
        positions_3BL[:, row, :length] = np.array(list(_positions(span, length))).T
    return PaddedBatch(
        ids_BL=torch.from_numpy(ids_BL),
        labels_BL=torch.from_numpy(labels_BL),
        positions_3BL=torch.from_numpy(positions_3BL),
        image_BL=torch.from_numpy(image_BL),
        is_real_BL=torch.from_numpy(is_real_BL),
        masked_N=draw_masks(batch, setting, iteration),
        pixels=batch.pixels,
    )


def draw_masks(batch: MicroBatch, setting: Setting, iteration: int) -> torch.Tensor:
    """The visual tokens that the engine masks at `iteration`, bool [N]."""
    masks = [
        draw_mask(
            span.height * span.width,
            setting.mask_ratio,
            seed=setting.seed,
            key=key,
            step=iteration,
            image_index=0,
        )
        for sample, key in zip(batch.samples, batch.keys, strict=True)
        for span in sample.image_spans
    ]
    return torch.from_numpy(np.concatenate(masks))


def _positions(span: ImageSpan, length: int) -> Iterator[tuple[int, int, int]]:
    """(t, row, column) of every token, written out one by one: text counts on, patches stand on their grid."""
    for i in range(span.start):
        yield i, i, i
    for row in range(span.height):
        for column in range(span.width):
            yield span.start, span.start + row, span.start + column
    after = span.start + max(span.height, span.width)
    for i in range(length - span.stop):
        yield after + i, after + i, after + i
