"""Demo pages: 3 x 3 handwritten-digit scans, or one crop of a photograph, as square RGB pictures.

A page of 48 pixels is 6 x 6 visual tokens of 8 pixels: a digit is four of them, so that a token is a part of a thing
and can be guessed from its neighbours.

The material is real and ships inside two wheels, so nothing is downloaded: scikit-learn's `load_digits`
(1,797 scans of 8 x 8 pixels, from the UCI set "optical recognition of handwritten digits") and the
photographs of scikit-image's `data` module. A scan belongs either to training or to the held-out pages, never
to both.

Shapes: `C` = cells per side (3), `S` = page side in pixels, `c` = `S / C` = cell side in pixels.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

CELLS_PER_SIDE = 3
PAGE_SIDE_PIXELS = 48
HELD_OUT_EVERY = 6
"""Every sixth scan is held out: 300 of 1,797."""
NUM_NAMED_SCANS = 150
"""Training scans whose digits the text ever names; the others are on pages with a caption that names none."""

PHOTOGRAPHS = {
    "astronaut": "an astronaut",
    "brick": "a brick wall",
    "camera": "a man with a camera",
    "chelsea": "a cat",
    "coffee": "a cup of coffee",
    "coins": "old coins",
    "grass": "grass",
    "gravel": "gravel",
    "hubble_deep_field": "many galaxies",
    "moon": "the moon",
    "retina": "a retina",
    "rocket": "a rocket",
}
"""Loader in `skimage.data` -> short caption; all of them lie in the wheel."""

Picture = NDArray[np.uint8]


@dataclass(frozen=True, kw_only=True)
class Page:
    """One picture `[S, S, 3]` (uint8) and what it shows: `digits [C, C]`, or a photograph's `caption`."""

    picture: Picture
    digits: NDArray[np.int64] | None = None
    caption: str | None = None
    in_colour: bool = True


@dataclass(frozen=True, kw_only=True)
class Scans:
    """Digit scans as ink coverage `ink [n, g, g]` (0 = paper, 1 = ink) with their `labels [n]`."""

    ink: NDArray[np.float32]
    labels: NDArray[np.int64]

    def first(self, count: int) -> "Scans":
        """The first `count` of them."""
        return Scans(ink=self.ink[:count], labels=self.labels[:count])


def load_scans(*, page_side: int = PAGE_SIDE_PIXELS) -> tuple[Scans, Scans]:
    """Return (training, held-out) scans, enlarged to seven eighths of a cell so that they can move inside it.

    Raises ValueError if `page_side` is not a multiple of 24 pixels (3 cells of a whole number of eighths).
    """
    from sklearn.datasets import load_digits  # here, so that training never needs the demo's libraries

    if page_side <= 0 or page_side % (8 * CELLS_PER_SIDE):
        raise ValueError(f"page_side={page_side} is not a positive multiple of 24 pixels; use 48, 72 or 96")
    digits = load_digits()
    side = page_side // CELLS_PER_SIDE * 7 // 8
    scans = [Image.fromarray(scan.astype(np.float32) / 16) for scan in digits.images]
    enlarged = [scan.resize((side, side), Image.Resampling.BICUBIC) for scan in scans]
    ink = np.clip(np.stack([np.asarray(scan) for scan in enlarged]), 0.0, 1.0)
    labels = digits.target.astype(np.int64)
    held_out = np.arange(len(labels)) % HELD_OUT_EVERY == 0
    return (
        Scans(ink=ink[~held_out], labels=labels[~held_out]),
        Scans(ink=ink[held_out], labels=labels[held_out]),
    )


def load_photographs() -> dict[str, Picture]:
    """Return scikit-image's bundled photographs by name, each as uint8 `[height, width]` or `[..., 3]`."""
    from skimage import data

    return {name: np.asarray(getattr(data, name)()) for name in PHOTOGRAPHS}


def digit_page(scans: Scans, rng: np.random.Generator, *, page_side: int = PAGE_SIDE_PIXELS) -> Page:
    """Compose nine scans, each shifted a little in its cell, in dark ink of one colour on light paper."""
    cell = page_side // CELLS_PER_SIDE
    glyph = scans.ink.shape[-1]
    chosen = rng.integers(len(scans.labels), size=(CELLS_PER_SIDE, CELLS_PER_SIDE))
    shifts = rng.integers(cell - glyph + 1, size=(CELLS_PER_SIDE, CELLS_PER_SIDE, 2))
    coverage = np.zeros((page_side, page_side, 1), dtype=np.float32)
    for (row, column), scan in np.ndenumerate(chosen):
        top, left = row * cell + shifts[row, column, 0], column * cell + shifts[row, column, 1]
        coverage[top : top + glyph, left : left + glyph, 0] = scans.ink[scan]
    paper = rng.uniform(225, 255, size=3).astype(np.float32)
    ink = rng.uniform(0, 70, size=3).astype(np.float32)
    picture = np.rint(paper + coverage * (ink - paper)).astype(np.uint8)
    return Page(picture=picture, digits=scans.labels[chosen])


def photograph_page(
    photographs: dict[str, Picture], rng: np.random.Generator, *, page_side: int = PAGE_SIDE_PIXELS
) -> Page:
    """Crop a square of 60 to 100 % of a random photograph's shorter side and shrink it to one page."""
    name = str(rng.choice(sorted(photographs)))
    whole = Image.fromarray(photographs[name])
    side = int(min(whole.size) * rng.uniform(0.6, 1.0))
    left, top = (int(rng.integers(length - side + 1)) for length in whole.size)
    crop = whole.crop((left, top, left + side, top + side)).convert("RGB")
    picture = np.asarray(crop.resize((page_side, page_side), Image.Resampling.BICUBIC))
    return Page(picture=picture, caption=PHOTOGRAPHS[name], in_colour=photographs[name].ndim == 3)
