"""Packed documents for tests and benchmarks: their intervals, dense mask and positions, and odd shapes."""

import torch
from torch import Tensor

from laver_kernels.mixed_attention.intervals import Intervals

Segment = tuple[str, int]  # ("text" or "image", tokens)
Document = tuple[Segment, ...]


def text(num_tokens: int) -> Segment:
    return ("text", num_tokens)


def image(num_tokens: int) -> Segment:
    return ("image", num_tokens)


def intervals_of(documents: tuple[Document, ...], padding: int = 0) -> Intervals:
    """Rows by hand, columns by hand: text causal, an image's tokens both ways, then empty padding rows."""
    row_lo, row_hi, col_lo, col_hi = [], [], [], []
    blocks = [0]
    place = 0
    for document in documents:
        start, end = place, place + sum(length for _, length in document)
        for kind, length in document:
            for at in range(place, place + length):
                row_lo.append(start)
                row_hi.append(place + length if kind == "image" else at + 1)
                col_lo.append(place if kind == "image" else at)
                col_hi.append(end)
            place += length
        blocks.append(place)
    bounds = ([*bound, *[0] * padding] for bound in (row_lo, row_hi, col_lo, col_hi))
    tensors = (torch.tensor(bound, dtype=torch.int32) for bound in bounds)
    row_lo_T, row_hi_T, col_lo_T, col_hi_T = tensors
    return Intervals(
        row_lo_T=row_lo_T,
        row_hi_T=row_hi_T,
        col_lo_T=col_lo_T,
        col_hi_T=col_hi_T,
        blocks=(*blocks, place + padding) if padding else tuple(blocks),
    )


def dense_mask(documents: tuple[Document, ...], padding: int = 0) -> Tensor:
    """allow(i, j) = same document, not padding, and (j <= i or same image): the definition."""
    document_of, image_of = [], []
    num_images = 0
    for number, document in enumerate(documents):
        for kind, length in document:
            num_images += kind == "image"
            document_of += [number] * length
            image_of += [num_images if kind == "image" else 0] * length
    document_T = torch.tensor(document_of + [-1] * padding)
    image_T = torch.tensor(image_of + [0] * padding)
    place_T = torch.arange(len(document_T))
    same_document = (document_T[:, None] == document_T) & (document_T >= 0)
    same_image = (image_T[:, None] == image_T) & (image_T > 0)
    return same_document & ((place_T <= place_T[:, None]) | same_image)


def positions_of(documents: tuple[Document, ...], padding: int = 0) -> Tensor:
    """(t, row, column) of every token, int64 `[3, T]`: images on a grid as square as their length allows."""
    positions: list[tuple[int, int, int]] = []
    for document in documents:
        following = 0
        for kind, length in document:
            if kind == "text":
                positions += [(following + i,) * 3 for i in range(length)]
                following += length
                continue
            width = max(w for w in range(1, int(length**0.5) + 1) if length % w == 0)
            positions += [(following, following + i // width, following + i % width) for i in range(length)]
            following += max(width, length // width)
    positions += [(0, 0, 0)] * padding
    return torch.tensor(positions, dtype=torch.int64).T.contiguous()


# name -> documents, padding tokens. Tiles are 32 tokens or fewer in the interpreter, up to 128 on a GPU.
MASKS: dict[str, tuple[tuple[Document, ...], int]] = {
    "one token": (((text(1),),), 0),
    "causal": (((text(70),),), 0),
    "full": (((image(70),),), 0),
    "tile exactly": (((text(64),),), 0),
    "image first": (((image(40), text(17)),), 0),
    "image last": (((text(13), image(37)),), 0),
    "image across a tile": (((text(25), image(12), text(10)),), 0),
    "adjacent images": (((text(3), image(20), image(33), text(9)),), 0),
    "one-token images": (((text(5), image(1), text(30), image(1)),), 0),
    "two documents in a tile": (((text(9), image(6)), (image(4), text(7))), 0),
    "documents of every size": (
        ((text(20), image(49), text(11)), (image(16),), (text(1),), (text(40), image(40))),
        0,
    ),
    "reconstruction": (((image(49),), (image(36),), (image(1),), (image(27),)), 0),
    "padding tail": (((text(10), image(9), text(4)), (image(8), text(6))), 33),
    "padding alone": ((), 5),
}


def one_image_documents(num_tokens: int) -> tuple[Document, ...]:
    """The whole sequence as one document with one 729-token image near its start."""
    return (
        (text(min(32, num_tokens - 729)), image(729), text(num_tokens - 729 - min(32, num_tokens - 729))),
    )


def many_image_documents(
    num_tokens: int, document_tokens: int = 4096, images: int = 5
) -> tuple[Document, ...]:
    """Documents of 4096 tokens with five 729-token images each: at T = 8192, 28 % of the square."""
    document_tokens = min(document_tokens, num_tokens)
    gap = (document_tokens - images * 729) // (images + 1)
    segments: list[Segment] = []
    for _ in range(images):
        segments += [text(gap), image(729)]
    segments.append(text(document_tokens - sum(length for _, length in segments)))
    return (tuple(segments),) * (num_tokens // document_tokens)
