"""What a published set holds, seen before anyone trains on it: every record checked as a conversion checks it."""

import hashlib
import io
import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image, ImageFile
from tqdm import tqdm

from laver_mcore.data.errors import DataError, one_sample
from laver_mcore.data.images.decode import to_rgb
from laver_mcore.data.images.source import read_image_bytes
from laver_mcore.data.prepare.convert import Corpus
from laver_mcore.data.prepare.record import PreparedSample, prepare_record
from laver_mcore.data.prepare.transcode import ImageLimits
from laver_mcore.data.randomness import permutation

_PICTURES_A_REASON = 4
_DUPLICATES = 12
_THUMBNAIL = 96  # pixels

TextTokens = Callable[[str], int]
VisualTokens = Callable[[int, int], int]


@dataclass
class Reason:
    """Records that are rejected for one reason."""

    kind: str
    example: str
    count: int = 0
    pictures: list[tuple[str, bytes]] = field(default_factory=list)
    """Their reasons, and thumbnails (JPEG) of as much as can be decoded."""


@dataclass
class Survey:
    """Counts and lists of a set; lengths are characters where no tokenizer was given."""

    num_records: int = 0
    kinds: Counter[str] = field(default_factory=Counter)
    sizes: list[tuple[int, int]] = field(default_factory=list)
    text_lengths: list[int] = field(default_factory=list)
    visual_tokens: list[int] = field(default_factory=list)
    reasons: dict[str, Reason] = field(default_factory=dict)
    images_seen: Counter[str] = field(default_factory=Counter)
    samples_seen: Counter[str] = field(default_factory=Counter)
    thumbnails: dict[str, bytes] = field(default_factory=dict)
    """Of images that stand there more than once, by their hash."""

    def add(
        self, sample: PreparedSample, text_tokens: TextTokens, visual_tokens: VisualTokens | None
    ) -> None:
        """Count one good record."""
        record = json.loads(sample.record)
        count = len(sample.images)
        self.kinds["text alone" if not count else "1 image" if count == 1 else f"{count} images"] += 1
        self.sizes += [(image.width, image.height) for image in sample.images]
        texts = [
            part["text"] for turn in record["turns"] for part in turn["content"] if part["type"] == "text"
        ]
        self.text_lengths.append(sum(map(text_tokens, texts)))
        if visual_tokens is not None:
            self.visual_tokens.append(sum(visual_tokens(i.width, i.height) for i in sample.images))
        hashes = [image.blake2b for image in sample.images]
        whole = json.dumps([record["turns"], hashes]).encode()
        self.samples_seen[hashlib.blake2b(whole, digest_size=16).hexdigest()] += 1
        for image in sample.images:
            self.images_seen[image.blake2b] += 1
            if self.images_seen[image.blake2b] == 2 and len(self.thumbnails) < _DUPLICATES:
                self.thumbnails[image.blake2b] = thumbnail(image.data) or b""

    def reject(self, error: DataError, picture: Callable[[], bytes | None]) -> None:
        """Count one bad record, a picture beside the first ones of each reason."""
        text = general(str(error))
        reason = self.reasons.setdefault(f"{error.kind} {text}", Reason(error.kind, text))
        reason.count += 1
        if len(reason.pictures) < _PICTURES_A_REASON and (found := picture()):
            reason.pictures.append((str(error), found))


def survey(
    source: Corpus,
    *,
    limits: ImageLimits,
    num_samples: int | None = None,
    seed: int = 0,
    text_tokens: TextTokens = len,
    visual_tokens: VisualTokens | None = None,
) -> Survey:
    """Read a set, `num_samples` of its records drawn at random where given; DataError where none can be found."""
    locators: Sequence[Any] = list(source.scan())
    if not locators:
        raise DataError(f"{source.path}: holds no records")
    if num_samples is not None:
        drawn = np.sort(permutation(len(locators), "prepare sample", seed)[:num_samples])
        locators = [locators[number] for number in drawn]
    found = Survey(num_records=len(locators))
    for locator in tqdm(locators, desc="surveying", unit=" samples", disable=None):
        try:
            with one_sample(f"{source.path}, record {list(locator)}"):
                found.add(prepare_record(source, locator, limits), text_tokens, visual_tokens)
        except DataError as error:
            found.reject(error, lambda locator=locator: _picture_of(source, locator))  # type: ignore[misc]
    return found


def general(reason: str) -> str:
    """A reason without the place, names and numbers of one record: what several records share."""
    what = reason.partition(": ")[2] or reason
    return re.sub(r"\d[\d,.]*", "N", re.sub(r"'[^']*'", "'...'", what))


def thumbnail(encoded: bytes) -> bytes | None:
    """A small JPEG of an encoded image, or of as much of it as can be decoded; None where nothing can."""
    file, strict = io.BytesIO(), ImageFile.LOAD_TRUNCATED_IMAGES
    ImageFile.LOAD_TRUNCATED_IMAGES = True  # Pillow has no other way to ask for a part of a picture
    try:
        with Image.open(io.BytesIO(encoded)) as image:
            small = to_rgb(image)
        small.thumbnail((_THUMBNAIL, _THUMBNAIL))
        small.save(file, "JPEG")
    except Exception:  # whatever a damaged file provokes: there is no picture of it
        return None
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = strict
    return file.getvalue()


def _picture_of(source: Corpus, locator: Sequence[int]) -> bytes | None:
    """The first picture of a rejected record that can be shown."""
    try:
        with one_sample("rejected"):
            for image in source.read(locator).images:
                if small := thumbnail(read_image_bytes(image)):
                    return small
    except DataError:
        pass
    return None
