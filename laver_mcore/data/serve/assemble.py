"""The two things that are done for a micro-batch, here or in a worker: read and tokenise; read and decode images.

What comes back is NumPy or plain data, so that a worker's answer is one copy through a pipe. Both call `at(sample)`
before they touch a sample, so that whoever waits knows where it got stuck.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from laver_mcore.data.errors import DataError
from laver_mcore.data.images.source import LoadedImage, read_image_bytes
from laver_mcore.data.images.wanted import PixelMaker, WantedImage
from laver_mcore.data.order.dialogues import Dialogues, DialogueSample
from laver_mcore.data.sequence.prompt import IGNORE, EncodedSample

Announce = Callable[[int], None]


@dataclass(frozen=True, kw_only=True)
class Readers:
    """What tasks work with; without `make_pixels` images are read and decoded elsewhere."""

    dialogues: Dialogues
    make_pixels: PixelMaker | None
    make_targets: PixelMaker | None = None
    """What a frozen encoder that gives targets sees in the same images, or its features."""


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenizedSamples:
    """A micro-batch's samples as tokens; `failures` says why some are blank."""

    samples: tuple[DialogueSample, ...]
    failures: dict[int, str]


@dataclass(frozen=True, kw_only=True, eq=False)
class ReadImages:
    """A rank's share of a micro-batch's images, as pixels or as encoded bytes.

    `failures` are samples (numbers) with an image that could not be read, and why.
    """

    images: tuple[WantedImage, ...] = ()
    pixels: np.ndarray | torch.Tensor | None = None
    targets: np.ndarray | torch.Tensor | None = None
    failures: dict[int, str]


@dataclass(frozen=True, kw_only=True)
class ReadTask:
    """Read and tokenise samples; those in `lost` (number: why) are not touched and come out blank."""

    members: tuple[int, ...]
    lost: Mapping[int, str] = field(default_factory=dict)

    def without(self, number: int, why: str) -> "ReadTask":
        """The same task without a sample that cannot be read."""
        return replace(self, lost={**self.lost, number: why})

    def run(self, readers: Readers, at: Announce) -> TokenizedSamples:
        samples = []
        for number in self.members:
            at(number)
            lost = number in self.lost
            samples.append(blank(readers.dialogues, number) if lost else readers.dialogues.read(number))
        return TokenizedSamples(samples=tuple(samples), failures=dict(self.lost))


@dataclass(frozen=True, kw_only=True)
class ImageTask:
    """Read images, and decode them where the readers can; `owners` are the samples that they belong to."""

    images: tuple[WantedImage, ...]
    owners: tuple[int, ...]
    lost: Mapping[int, str] = field(default_factory=dict)

    def without(self, number: int, why: str) -> "ImageTask":
        """The same task without the images of a sample that cannot be read."""
        kept = [(i, o) for i, o in zip(self.images, self.owners, strict=True) if o != number]
        images, owners = tuple(i for i, _ in kept), tuple(o for _, o in kept)
        return ImageTask(images=images, owners=owners, lost={**self.lost, number: why})

    def run(self, readers: Readers, at: Announce) -> ReadImages:
        if readers.make_pixels is None:
            return self._read(at)
        targets = [] if readers.make_targets is None else [readers.make_targets]
        return self._decode([readers.make_pixels, *targets], at)

    def _decode(self, makers: Sequence[PixelMaker], at: Announce) -> ReadImages:
        # One by one, so that a hang has a name; the empty call gives the shape where there is no image.
        parts, failures = [[make([])[0]] for make in makers], dict(self.lost)
        for image, owner in zip(self.images, self.owners, strict=True):
            at(owner)
            for make, made in zip(makers, parts, strict=True):
                pixels, failed = make([image])
                made.append(pixels)
                for why in failed.values():
                    failures.setdefault(owner, why)
        whole, *targets = (torch.cat(made).numpy() for made in parts)
        return ReadImages(pixels=whole, targets=targets[0] if targets else None, failures=failures)

    def _read(self, at: Announce) -> ReadImages:
        loaded, failures = [], dict(self.lost)
        for image, owner in zip(self.images, self.owners, strict=True):
            at(owner)
            try:
                data = read_image_bytes(image.source)
            except DataError as error:
                failures.setdefault(owner, str(error))
                data = b""
            loaded.append(replace(image, source=LoadedImage(str(image.source), data)))
        return ReadImages(images=tuple(loaded), failures=failures)


Task = ReadTask | ImageTask


def blank(dialogues: Dialogues, number: int) -> DialogueSample:
    """A sample in its place and of its length, without anything to learn or to see."""
    tokens_L = np.full(int(dialogues.lengths[number]), dialogues.pad_id, dtype=np.int32)
    encoded = EncodedSample(token_ids_L=tokens_L, labels_L=np.full_like(tokens_L, IGNORE), image_spans=())
    return DialogueSample(dialogues.key(number), encoded, ())


def decode_here(
    pictures: ReadImages,
    owners: Sequence[int],
    make_pixels: PixelMaker,
    make_targets: PixelMaker | None = None,
) -> ReadImages:
    """Images whose bytes a worker has read, decoded all at once; not when some could not even be read."""
    if pictures.pixels is not None or pictures.failures:
        return pictures
    pixels, failed = make_pixels(pictures.images)
    targets = None
    if make_targets is not None:
        targets, lost = make_targets(pictures.images)
        failed = lost | failed
    failures: dict[int, str] = {}
    for position, why in failed.items():
        failures.setdefault(owners[position], why)
    return ReadImages(pixels=pixels, targets=targets, failures=failures)
