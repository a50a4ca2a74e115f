"""Which tiles the Gram kernels walk: waves of images whose weights W fit a workspace of fixed size.

The first wave's W is made in the forward and kept; that of the others is made again in the backward, one wave
after another in the same memory. An image too large for the workspace goes in slabs of row blocks.
"""

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

WORKSPACE_BYTES = 256 * 2**20  # 64 images of 1024 tokens take 128 MiB in bf16: nothing is made twice


@dataclass(frozen=True, kw_only=True)
class Slab:
    """Row blocks `[first, last)` of one image; `w_start` is where row 0 of its W would lie."""

    image: int
    first: int
    last: int
    w_start: int


@dataclass(frozen=True, kw_only=True)
class Split:
    """A wave on the host: its slabs, the elements of its W, and whether they are whole images."""

    slabs: tuple[Slab, ...]
    w_elements: int
    is_whole: bool


@dataclass(frozen=True, kw_only=True)
class Wave:
    """A wave on the device: tiles `[n, 3]` (image, i, j) of the Gram matrices, `[n, 2]` (image, i) of the gradient."""

    gram_tiles: Tensor
    gradient_tiles: Tensor
    w_starts: Tensor  # int64, per image
    w_elements: int
    is_whole: bool  # tiles i <= j alone, each mirrored; slabs compute both triangles


@dataclass(frozen=True, kw_only=True)
class Plan:
    """All launches for one tuple of image lengths."""

    starts: Tensor
    lengths: Tensor
    waves: tuple[Wave, ...]
    other_tiles: Tensor  # tiles i <= j of the images whose W the forward does not keep: for their loss
    num_kept: int  # waves whose W the forward keeps: 0 or 1


def w_stride(length: int) -> int:
    """Elements from one row of an image's W to the next: rows start on 16 bytes."""
    return triton.cdiv(length, 8) * 8


@functools.lru_cache(maxsize=64)
def split(lengths: tuple[int, ...], block: int, rows: int, max_elements: int) -> tuple[Split, ...]:
    """Cuts the images into waves of at most `max_elements` of W, or a single row block where that is more.

    `block` is the side of a Gram tile, `rows` the rows of a gradient tile, both powers of two.
    """
    unit = max(block, rows)
    waves: list[Split] = []
    slabs: list[Slab] = []
    used = 0

    def close() -> None:
        nonlocal slabs, used
        if slabs:
            waves.append(Split(slabs=tuple(slabs), w_elements=used, is_whole=True))
        slabs, used = [], 0

    for image, length in enumerate(lengths):
        stride, blocks = w_stride(length), triton.cdiv(length, block)
        size = triton.cdiv(length * stride, 16) * 16
        if size > max_elements:
            close()
            step = max(1, max_elements // (unit * stride)) * (unit // block)
            for first in range(0, blocks, step):
                last = min(first + step, blocks)
                slab = Slab(image=image, first=first, last=last, w_start=-first * block * stride)
                rows = min(length, last * block) - first * block
                waves.append(Split(slabs=(slab,), w_elements=rows * stride, is_whole=False))
        elif length:
            if used + size > max_elements:
                close()
            slabs.append(Slab(image=image, first=0, last=blocks, w_start=used))
            used += size
    close()
    return tuple(waves)


def num_kept(waves: tuple[Split, ...]) -> int:
    """How many waves' W the forward keeps: the first, if it is of whole images."""
    return int(waves[0].is_whole)


@functools.lru_cache(maxsize=64)
def plan_of(lengths: tuple[int, ...], block: int, rows: int, max_elements: int, device: torch.device) -> Plan:
    """The launches on a device; remembered, since fixed-resolution images repeat."""
    waves = split(lengths, block, rows, max_elements)
    keep = num_kept(waves)
    kept_images = {slab.image for wave in waves[:keep] for slab in wave.slabs}
    others = [image for image in range(len(lengths)) if image not in kept_images]
    starts = list(itertools.accumulate(lengths, initial=0))[:-1]
    return Plan(
        starts=_on_device(starts, torch.int32, device),
        lengths=_on_device(lengths, torch.int32, device),
        waves=tuple(_on_device_wave(wave, lengths, block, rows, device) for wave in waves),
        other_tiles=_on_device(
            [tile for image in others for tile in _triangle(image, triton.cdiv(lengths[image], block))],
            torch.int32,
            device,
        ),
        num_kept=keep,
    )


def _triangle(image: int, blocks: int) -> list[tuple[int, int, int]]:
    return [(image, i, j) for i in range(blocks) for j in range(i, blocks)]


def _on_device_wave(
    wave: Split, lengths: tuple[int, ...], block: int, rows: int, device: torch.device
) -> Wave:
    gram, gradient = [], []
    w_starts = [0] * len(lengths)
    for slab in wave.slabs:
        length = lengths[slab.image]
        blocks = triton.cdiv(length, block)
        if wave.is_whole:
            gram += _triangle(slab.image, blocks)
        else:
            gram += [(slab.image, i, j) for i in range(slab.first, slab.last) for j in range(blocks)]
        end = min(length, slab.last * block)
        gradient += [(slab.image, i) for i in range(slab.first * block // rows, triton.cdiv(end, rows))]
        w_starts[slab.image] = slab.w_start
    return Wave(
        gram_tiles=_on_device(gram, torch.int32, device),
        gradient_tiles=_on_device(gradient, torch.int32, device),
        w_starts=_on_device(w_starts, torch.int64, device),
        w_elements=wave.w_elements,
        is_whole=wave.is_whole,
    )


def _on_device(values: Sequence, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Through pinned memory on a GPU: a copy from pageable memory may wait for the stream."""
    tensor = torch.tensor(values, dtype=dtype)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor
