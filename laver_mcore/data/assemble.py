"""A plan of a micro-batch -> its samples as tokens and its images as pixels or bytes, here or in a worker.

Everything is NumPy or plain data, so that a worker's answer is one copy through a pipe.
"""

from dataclasses import dataclass, replace

import numpy as np

from laver_mcore.data.balance import image_shares
from laver_mcore.data.dialogues import Dialogues, DialogueSample
from laver_mcore.data.errors import DataError
from laver_mcore.data.image_backend import PixelMaker, WantedImage
from laver_mcore.data.image_source import LoadedImage, read_image_bytes
from laver_mcore.data.prompt import IGNORE, EncodedSample


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Which samples a micro-batch holds, and which of its images this rank decodes.

    `image_share` = (i, n): the i-th of n shares; None: none. A sample in `silenced` keeps its place and
    length but has neither labels nor images.
    """

    members: tuple[int, ...]
    image_share: tuple[int, int] | None
    silenced: frozenset[int] = frozenset()


@dataclass(frozen=True, kw_only=True, eq=False)
class Assembled:
    """What a plan came to; `failures` are samples (numbers) with an image that could not be read, and why."""

    encoded: tuple[EncodedSample, ...]
    keys: tuple[str, ...]
    images: tuple[WantedImage, ...] = ()  # of the share
    owners: tuple[int, ...] = ()  # the sample of each image of the share
    pixels: np.ndarray | None = None
    failures: dict[int, str]


def assemble(dialogues: Dialogues, plan: Plan) -> Assembled:
    """Read and tokenise the samples of a plan; its images are only listed."""
    samples = [dialogues.read(number) for number in plan.members]
    samples = [
        _silence(sample) if number in plan.silenced else sample
        for number, sample in zip(plan.members, samples, strict=True)
    ]
    owned = [
        (number, image)
        for number, sample in zip(plan.members, samples, strict=True)
        for image in sample.images
    ]
    if plan.image_share is None:
        owned = []
    else:
        index, num_shares = plan.image_share
        grids = [(span.height, span.width) for sample in samples for span in sample.encoded.image_spans]
        start, stop = image_shares(grids, num_shares)[index]
        owned = owned[start:stop]
    return Assembled(
        encoded=tuple(sample.encoded for sample in samples),
        keys=tuple(sample.key for sample in samples),
        images=tuple(image for _, image in owned),
        owners=tuple(number for number, _ in owned),
        failures={},
    )


def _silence(sample: DialogueSample) -> DialogueSample:
    """The same number of tokens, none learned, none visual."""
    encoded = replace(sample.encoded, labels_L=np.full_like(sample.encoded.labels_L, IGNORE), image_spans=())
    return DialogueSample(sample.key, encoded, ())


def with_pixels(assembled: Assembled, make_pixels: PixelMaker) -> Assembled:
    """Decode and process the images; those that fail are grey, and their samples are failures."""
    pixels, failures = make_pixels(assembled.images)
    return _answer(assembled, failures, pixels=pixels.numpy())


def with_bytes(assembled: Assembled) -> Assembled:
    """Read the images' encoded bytes, for decoding elsewhere."""
    loaded, failures = [], {}
    for position, image in enumerate(assembled.images):
        try:
            data = read_image_bytes(image.source)
        except DataError as error:
            failures[position] = str(error)
            data = b""
        loaded.append(replace(image, source=LoadedImage(str(image.source), data)))
    return _answer(assembled, failures, images=tuple(loaded))


def _answer(assembled: Assembled, failures: dict[int, str], **changes: object) -> Assembled:
    of_samples = dict(assembled.failures)
    for position, reason in failures.items():
        of_samples.setdefault(assembled.owners[position], reason)
    return replace(assembled, failures=of_samples, **changes)  # type: ignore[arg-type]
