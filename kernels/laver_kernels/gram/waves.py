"""Which tiles the Gram kernels walk: waves of images whose weights W fit a workspace of fixed size.

The first wave's W is made in the forward and kept; that of the others is made again in the backward, one wave
after another in the same memory. An image too large for the workspace goes in slabs of row blocks.
"""

import functools
import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from laver_kernels.launch import cdiv

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
    return cdiv(length, 8) * 8


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
        stride, blocks = w_stride(length), cdiv(length, block)
        size = cdiv(length * stride, 16) * 16
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
    """The launches on a device; remembered, since fixed-resolution images repeat.

    At native resolution every step brings new lengths: all lists go to the device in one copy.
    """
    waves = split(lengths, block, rows, max_elements)
    keep = num_kept(waves)
    kept_images = {slab.image for wave in waves[:keep] for slab in wave.slabs}
    others = [image for image in range(len(lengths)) if image not in kept_images]
    starts = list(itertools.accumulate(lengths, initial=0))[:-1]
    lists = [
        torch.tensor(starts, dtype=torch.int32),
        torch.tensor(lengths, dtype=torch.int32),
        _tiles([(image, _triangle(cdiv(lengths[image], block))) for image in others], 3),
    ]
    for wave in waves:
        lists += _wave_lists(wave, lengths, block, rows)
    starts_I, lengths_I, other_tiles, *rest = _on_device(lists, device)
    return Plan(
        starts=starts_I,
        lengths=lengths_I,
        waves=tuple(
            Wave(
                gram_tiles=rest[3 * at],
                gradient_tiles=rest[3 * at + 1],
                w_starts=rest[3 * at + 2],
                w_elements=wave.w_elements,
                is_whole=wave.is_whole,
            )
            for at, wave in enumerate(waves)
        ),
        other_tiles=other_tiles,
        num_kept=keep,
    )


def _wave_lists(wave: Split, lengths: tuple[int, ...], block: int, rows: int) -> list[Tensor]:
    """A wave's Gram tiles, gradient tiles and starts of W, on the host."""
    gram, gradient = [], []
    w_starts = [0] * len(lengths)
    for slab in wave.slabs:
        length = lengths[slab.image]
        blocks = cdiv(length, block)
        tiles = _triangle(blocks) if wave.is_whole else _rectangle(slab.first, slab.last, blocks)
        gram.append((slab.image, tiles))
        end = min(length, slab.last * block)
        gradient.append((slab.image, _rectangle(slab.first * block // rows, cdiv(end, rows), 1)[:, :1]))
        w_starts[slab.image] = slab.w_start
    return [_tiles(gram, 3), _tiles(gradient, 2), torch.tensor(w_starts, dtype=torch.int64)]


@functools.lru_cache(maxsize=1024)
def _triangle(blocks: int) -> Tensor:
    """(i, j) with i <= j, row after row."""
    return torch.triu_indices(blocks, blocks, dtype=torch.int32).T.contiguous()


@functools.lru_cache(maxsize=1024)
def _rectangle(first: int, last: int, blocks: int) -> Tensor:
    i, j = torch.arange(first, last, dtype=torch.int32), torch.arange(blocks, dtype=torch.int32)
    return torch.cartesian_prod(i, j).reshape(-1, 2)


def _tiles(parts: list[tuple[int, Tensor]], width: int) -> Tensor:
    """Tiles of several images, each with its image before it: int32 `[n, width]`."""
    if not parts:
        return torch.empty(0, width, dtype=torch.int32)
    counts = torch.tensor([len(tiles) for _, tiles in parts])
    images = torch.tensor([image for image, _ in parts], dtype=torch.int32).repeat_interleave(counts)
    return torch.cat([images[:, None], torch.cat([tiles for _, tiles in parts])], dim=1)


def _on_device(lists: list[Tensor], device: torch.device) -> list[Tensor]:
    """All of them through one pinned buffer: a copy from pageable memory may wait for the stream.

    Each begins on 16 bytes: where a pointer does not, Triton compiles another kernel.
    """
    if device.type != "cuda":
        return lists
    sizes = [-(-each.nbytes // 16) * 4 for each in lists]
    buffer = torch.zeros(sum(sizes), dtype=torch.int32, pin_memory=True)
    for place, each in zip(buffer.split(sizes), lists, strict=True):
        flat = each.flatten().view(torch.int32)
        place[: len(flat)] = flat
    places = buffer.to(device, non_blocking=True).split(sizes)
    return [
        place[: each.nbytes // 4].view(each.dtype).view(each.shape)
        for place, each in zip(places, lists, strict=True)
    ]
