"""What has to be known of every sample beforehand: where it lies, its tokens, the size of its images.

Measured once, in parallel, with a progress bar, and kept beside the data (`.laver_index/`) under a digest of
the records, the tokenizer and the system prompt; every rank then maps the same files. Image tokens are not
part of it: they follow from the sizes, so another vision tower or resolution needs no new index.
"""

import fcntl
import hashlib
import json
import logging
import multiprocessing
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from laver_mcore.data.errors import DataError, one_sample
from laver_mcore.data.images.decode import encoded_size, image_size
from laver_mcore.data.images.source import TarMember, read_image_bytes
from laver_mcore.data.records.sample import Sample, UniqueKeys
from laver_mcore.data.records.sources import Source
from laver_mcore.data.sequence.prompt import text_length
from laver_mcore.data.sequence.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

FOLDER = ".laver_index"
_VERSION = 2
_CHUNK = 256  # samples measured at a time
_CHUNKS_OF_ONE_PROCESS = 8  # as many are measured before a worker has started
_KEPT_BAD = 0.05  # share of unusable samples up to which an index is kept
_CACHED_FROM = 2000  # samples; a smaller set is measured faster than it is found
_ARRAYS = ("locators", "text_lengths", "image_starts", "image_sizes", "key_starts", "keys")


@dataclass(frozen=True, kw_only=True, eq=False)
class SourceIndex:
    """Measurements of one source. Shapes: n = usable samples, I = their images, k = integers of a locator."""

    source: Source
    locators: np.ndarray  # int64 [n, k]
    text_lengths: np.ndarray  # int32 [n], all tokens but the visual ones
    image_starts: np.ndarray  # int64 [n + 1]: sample s has images [image_starts[s], image_starts[s + 1])
    image_sizes: np.ndarray  # int32 [I, 2]: width, height in pixels
    key_starts: np.ndarray  # int64 [n + 1], into keys
    keys: np.ndarray  # uint8, UTF-8
    bad: tuple[tuple[str, str, str], ...] = ()  # (where, reason, kind) of samples that cannot be used
    folder: Path | None = field(default=None)  # where the arrays are mapped from

    def __len__(self) -> int:
        return len(self.locators)

    def __reduce__(self) -> tuple[Any, ...]:
        if self.folder is not None:  # a worker maps the same files
            return load_index, (self.source, self.folder)
        return _restore, (dict(vars(self)),)

    def key(self, number: int) -> str:
        """The key of one sample, unique within the source."""
        return bytes(self.keys[self.key_starts[number] : self.key_starts[number + 1]]).decode()

    def sample(self, number: int) -> Sample:
        """Read one sample from the data."""
        sample = self.source.read(self.locators[number].tolist())
        return Sample(key=self.key(number), turns=sample.turns, images=sample.images)


def _restore(fields: dict[str, Any]) -> SourceIndex:
    return SourceIndex(**fields)


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One sample's measurements, or why it cannot be used."""

    name: str
    locator: tuple[int, ...]
    text_length: int = 0
    image_sizes: tuple[tuple[int, int], ...] = ()
    error: str | None = None
    kind: str = ""


def measure(
    source: Source, locators: Sequence[tuple[int, ...]], tokenizer: Tokenizer, system_prompt: str
) -> list[Measured]:
    """Read samples and measure them; bad ones come back with their error."""
    found = []
    for locator in locators:
        try:
            with one_sample(f"{source.name}{list(locator)}"):
                sample = source.read(locator, check_files=True)
                sizes = tuple(_image_size(image) for image in sample.images)
                length = text_length(sample.turns, len(sizes), tokenizer, system_prompt=system_prompt)
        except DataError as error:
            found.append(Measured(name="", locator=locator, error=str(error), kind=error.kind))
        else:
            found.append(Measured(name=sample.key, locator=locator, text_length=length, image_sizes=sizes))
    return found


def _image_size(image: Any) -> tuple[int, int]:
    if isinstance(image, TarMember) and image.width:
        return image.width, image.height
    if isinstance(image, Path):
        return image_size(image)
    return encoded_size(read_image_bytes(image), str(image))


def get_index(
    source: Source,
    tokenizer: Tokenizer,
    system_prompt: str,
    *,
    num_workers: int = 0,
    folder: Path | None = None,
) -> SourceIndex:
    """The index of a source: the one kept in `folder`, or a new one, kept there if the source is large.

    Of several processes that ask at once, one measures and the others wait for it.
    """
    settings = (_VERSION, source.fingerprint(), source.images_from, tokenizer.fingerprint(), system_prompt)
    digest = hashlib.blake2b(repr(settings).encode(), digest_size=12).hexdigest()
    target = None if folder is None else folder / f"{source.name}-{digest}"
    found = None if target is None else _kept(source, target, tokenizer, system_prompt)
    if found is not None:
        return found
    records = iter(
        tqdm(source.scan(), desc=f"reading {source.name}", unit=" records", delay=2.0, disable=None)
    )
    first = list(islice(records, _CACHED_FROM))
    locators = chain(first, records)
    if target is None or len(first) < _CACHED_FROM:
        return _build(source, locators, tokenizer, system_prompt, num_workers)
    with _locked(target) as writable:
        found = _kept(source, target, tokenizer, system_prompt)
        if found is not None:  # another process has made it meanwhile
            return found
        index = _build(source, locators, tokenizer, system_prompt, num_workers)
        # Much that is bad at once is a folder in the wrong place, not the samples: it is looked at again.
        if not writable or len(index.bad) > _KEPT_BAD * (len(index) + len(index.bad)):
            return index
        shutil.rmtree(target, ignore_errors=True)
        _store(index, target)
    return load_index(source, target)


def _kept(source: Source, target: Path, tokenizer: Tokenizer, system_prompt: str) -> SourceIndex | None:
    """The index that is kept; None where there is none, or where an image that it missed is there now."""
    if not target.is_dir():
        return None
    index = load_index(source, target)
    if not source.images_from:
        return index
    lost = [json.loads(where.removeprefix(source.name)) for where, _, kind in index.bad if kind == "image"]
    if not lost or all(each.error is not None for each in measure(source, lost, tokenizer, system_prompt)):
        return index
    logger.info("%s: images that were missing are there now; it is measured again", source.name)
    return None


@contextmanager
def _locked(target: Path) -> Iterator[bool]:
    """Hold the lock of one index; yields whether its folder can be written to."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        file = target.with_suffix(".lock").open("w")
    except OSError as error:
        logger.warning("%s: the index cannot be kept here (%s); every start measures again", target, error)
        yield False
        return
    with file:  # closing it unlocks it; it stays, for deleting it would let two processes hold it
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:  # Lustre without -o flock: two runs that start together measure twice
            logger.warning("%s: cannot be locked here (%s)", file.name, error.strerror)
        yield True


def _build(
    source: Source,
    locators: Iterable[tuple[int, ...]],
    tokenizer: Tokenizer,
    system_prompt: str,
    num_workers: int,
) -> SourceIndex:
    chunks = _chunks(locators)
    first = list(islice(chunks, _CHUNKS_OF_ONE_PROCESS + 1))
    if not first:
        raise DataError(f"{getattr(source, 'path', source.name)}: holds no records")
    if num_workers == 0 or len(first) <= _CHUNKS_OF_ONE_PROCESS:
        here = [*first, *chunks]
        measured = (measure(source, chunk, tokenizer, system_prompt) for chunk in here)
        return _assemble(source, _followed(source, measured, sum(map(len, here))))
    # Workers start and measure while the records behind are still looked for.
    spawn = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(
        num_workers, mp_context=spawn, initializer=_start, initargs=(source, tokenizer, system_prompt)
    )
    try:
        sizes = {pool.submit(_measure_here, chunk): len(chunk) for chunk in chain(first, chunks)}
        measured = (future.result() for future in sizes)
        return _assemble(source, _followed(source, measured, sum(sizes.values())))
    finally:
        pool.shutdown(cancel_futures=True)


def _followed(source: Source, measured: Iterable[list[Measured]], total: int) -> list[Measured]:
    """All chunks' measurements, behind a progress bar."""
    bar = tqdm(total=total, desc=f"measuring {source.name}", unit=" samples", delay=2.0, disable=None)
    results: list[Measured] = []
    with bar:
        for chunk in measured:
            results.extend(chunk)
            bar.update(len(chunk))
    return results


_state: tuple[Source, Tokenizer, str]  # of a measuring process; set once, by `_start`


def _start(source: Source, tokenizer: Tokenizer, system_prompt: str) -> None:
    global _state
    _state = (source, tokenizer, system_prompt)


def _measure_here(locators: Sequence[tuple[int, ...]]) -> list[Measured]:
    source, tokenizer, system_prompt = _state
    return measure(source, locators, tokenizer, system_prompt)


def _chunks(items: Iterable[Any]) -> Iterator[list[Any]]:
    iterator = iter(items)
    while chunk := list(islice(iterator, _CHUNK)):
        yield chunk


def _assemble(source: Source, results: list[Measured]) -> SourceIndex:
    good = [result for result in results if result.error is None]
    unique = UniqueKeys()
    keys = [unique(result.name).encode() for result in good]
    width = len(results[0].locator)
    return SourceIndex(
        source=source,
        locators=np.array([r.locator for r in good], dtype=np.int64).reshape(-1, width),
        text_lengths=np.array([r.text_length for r in good], dtype=np.int32),
        image_starts=np.cumsum([0, *(len(r.image_sizes) for r in good)], dtype=np.int64),
        image_sizes=np.array([s for r in good for s in r.image_sizes], dtype=np.int32).reshape(-1, 2),
        key_starts=np.cumsum([0, *map(len, keys)], dtype=np.int64),
        keys=np.frombuffer(b"".join(keys), dtype=np.uint8),
        bad=tuple(
            (f"{source.name}{list(r.locator)}", r.error, r.kind) for r in results if r.error is not None
        ),
    )


def _store(index: SourceIndex, target: Path) -> None:
    """Write all files, then make them visible at once."""
    partial = target.with_name(f"{target.name}.{os.getpid()}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for name in _ARRAYS:
        np.save(partial / f"{name}.npy", getattr(index, name))
    (partial / "bad.json").write_text(json.dumps(index.bad), encoding="utf-8")
    partial.replace(target)


def load_index(source: Source, folder: Path) -> SourceIndex:
    """Map an index that was stored; DataError when it is damaged."""
    try:
        arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in _ARRAYS}
        bad = tuple(
            (w, reason, kind) for w, reason, kind in json.loads((folder / "bad.json").read_text("utf-8"))
        )
    except (OSError, ValueError) as error:
        raise DataError(f"{folder}: damaged index ({error}); delete the folder") from None
    return SourceIndex(source=source, bad=bad, folder=folder, **arrays)
