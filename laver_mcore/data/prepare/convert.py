"""A published set -> tar shards.

Every shard is a pure function of the set and the options, written whole or not at all, so a conversion that
was killed goes on with the shards that are missing and ends with the same bytes.
"""

import hashlib
import json
import multiprocessing
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

import numpy as np
from tqdm import tqdm

from laver_mcore.data.errors import DataError, one_sample
from laver_mcore.data.prepare.energon import write_energon_metadata
from laver_mcore.data.prepare.record import PreparedSample, prepare_record
from laver_mcore.data.prepare.transcode import ImageLimits
from laver_mcore.data.randomness import permutation
from laver_mcore.data.records.finevision import RatingFilter
from laver_mcore.data.records.image_reference import ImageFolder
from laver_mcore.data.records.shards import MANIFEST, ShardSummary, ShardWriter
from laver_mcore.data.records.sources import JsonSource, ParquetSource, is_table
from laver_mcore.data.records.webdataset import WebDatasetSource, tar_files

Format = Literal["llava", "llava-onevision", "finevision", "webdataset"]
Corpus = JsonSource | ParquetSource | WebDatasetSource
REJECTS = "rejects.jsonl"
_PROGRESS = ".prepare"  # what is done, until all is
_IDENTITY = "identity"
_VERSION = 1
_MAX_SHARDS = 9999


@dataclass(frozen=True, kw_only=True)
class ConvertOptions:
    """What decides a prepared set besides its source."""

    format: Format
    seed: int = 0
    samples_per_shard: int = 2000
    num_samples: int | None = None
    """Records that are drawn at random, each as likely; all where None."""
    limits: ImageLimits = field(default_factory=ImageLimits)
    ratings: RatingFilter = field(default_factory=RatingFilter)


@dataclass(frozen=True, kw_only=True)
class _ShardTask:
    """One shard: which records it holds, in reading order."""

    number: int
    path: Path
    locators: tuple[tuple[int, ...], ...]
    source: Corpus
    options: ConvertOptions


def open_corpus(
    path: Path, image_folder: Path | None, options: ConvertOptions, *, allow_outside_images: bool = False
) -> Corpus:
    """The set at `path`; DataError when it is not of the wanted format's kind."""
    if options.format == "llava":
        if path.is_dir() or path.suffix.lower() == ".parquet":
            raise DataError(
                f"{path}: format 'llava' is a JSON or JSONL file; give the file, or another format"
            )
        return JsonSource(path, ImageFolder(image_folder or path.parent, allow_outside_images))
    if options.format == "webdataset":
        if path.suffix.lower() != ".tar" and not (path.is_dir() and tar_files(path)):
            raise DataError(f"{path}: format 'webdataset' is a tar file, or a folder of them")
        return WebDatasetSource(path)
    if not is_table(path):
        raise DataError(f"{path}: format {options.format!r} is a parquet or Arrow file, or a folder of them")
    return ParquetSource(path, options.ratings)


def convert(
    source: Corpus,
    output: Path,
    options: ConvertOptions,
    *,
    num_workers: int,
    max_bad_fraction: float = 0.1,
) -> dict[str, Any]:
    """Write the prepared set to `output` and return its manifest.

    Raises DataError for a folder of another set, and when more than `max_bad_fraction` of the records are
    rejected (those that a filter leaves out not counted); then there is no manifest.
    """
    progress = output / _PROGRESS
    identity = _identity(source, options)
    _check_claim(output, progress / _IDENTITY, identity)
    tasks = _plan(source, output, options)
    progress.mkdir(parents=True, exist_ok=True)  # not before there is something to convert
    (progress / _IDENTITY).write_text(identity, encoding="ascii")
    missing = [task for task in tasks if not (progress / f"{task.path.stem}.json").is_file()]
    total = sum(len(task.locators) for task in tasks)
    done = total - sum(len(task.locators) for task in missing)
    with tqdm(total=total, initial=done, desc="preparing", unit=" samples", disable=None) as bar:
        for num_samples in _run(missing, num_workers):
            bar.update(num_samples)
    reports = [json.loads((progress / f"{task.path.stem}.json").read_text("utf-8")) for task in tasks]
    rejects = [reject for report in reports for reject in report["rejects"]]
    lines = "".join(json.dumps(reject) + "\n" for reject in rejects)
    (output / REJECTS).write_text(lines, encoding="utf-8")
    _check_rejects(rejects, total, max_bad_fraction, output)
    return _finish(output, reports, rejects, identity, options)


def _check_rejects(
    rejects: Sequence[dict[str, Any]], total: int, max_bad_fraction: float, output: Path
) -> None:
    bad = [reject for reject in rejects if reject["kind"] != "filtered"]
    if len(bad) > Fraction(str(max_bad_fraction)) * total or len(rejects) == total:
        raise DataError(
            f"{(bad or rejects)[0]['reason']} ({len(rejects):,} of {total:,} records are rejected, "
            f"{_by_kind(rejects)}; max_bad_fraction is {max_bad_fraction:g}; all are in {output / REJECTS})"
        )


def _by_kind(rejects: Sequence[dict[str, Any]]) -> dict[str, int]:
    return dict(sorted(Counter(reject["kind"] for reject in rejects).items()))


def _identity(source: Corpus, options: ConvertOptions) -> str:
    settings = json.dumps({k: v for k, v in asdict(options).items() if v is not None}, sort_keys=True)
    text = f"{_VERSION} {source.fingerprint()} {settings}"
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _check_claim(output: Path, marker: Path, identity: str) -> None:
    """Refuse an `output` in which something lies that is not this very conversion's."""
    if marker.is_file():
        if marker.read_text(encoding="ascii") != identity:
            raise DataError(
                f"{output}: holds a conversion of other data or options; give another --output or delete it"
            )
    elif any(output.glob("*.tar")):
        raise DataError(f"{output}: holds tar files already; give another --output")


def _plan(source: Corpus, output: Path, options: ConvertOptions) -> list[_ShardTask]:
    """Deal the records out to shards: JSON record by record, parquet by row group, so each is read once."""
    locators = np.array(list(source.scan()), dtype=np.int64)
    if not len(locators):
        raise DataError(f"{source.path}: holds no records")
    if options.num_samples is not None:
        drawn = permutation(len(locators), "prepare sample", options.seed)[: options.num_samples]
        locators = locators[np.sort(drawn)]
    size = max(options.samples_per_shard, -(-len(locators) // _MAX_SHARDS))
    if isinstance(source, ParquetSource):
        _, group_of = np.unique(locators[:, :2], axis=0, return_inverse=True)
        group_of = group_of.reshape(-1)
        rank = permutation(int(group_of.max()) + 1, "prepare groups", options.seed)
        order = np.argsort(rank[group_of], kind="stable")
    else:
        order = permutation(len(locators), "prepare", options.seed)
    tasks = []
    for number, start in enumerate(range(0, len(order), size)):
        chosen = np.sort(order[start : start + size])  # reading order: forward through the files
        rows = tuple(tuple(int(v) for v in row) for row in locators[chosen])
        path = output / f"shard-{number:06d}.tar"
        tasks.append(_ShardTask(number=number, path=path, locators=rows, source=source, options=options))
    return tasks


def _run(tasks: Sequence[_ShardTask], num_workers: int) -> Any:
    """Yield the number of records of each shard as it is done."""
    if num_workers <= 1:
        for task in tasks:
            yield _write_shard(task)
        return
    pool = ProcessPoolExecutor(num_workers, mp_context=multiprocessing.get_context("spawn"))
    try:
        for future in as_completed([pool.submit(_write_shard, task) for task in tasks]):
            yield future.result()
    except BrokenProcessPool:
        raise DataError("a worker was killed; run the same command again to go on where it stopped") from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _write_shard(task: _ShardTask) -> int:
    prepared: list[tuple[int, PreparedSample]] = []
    rejects = []
    for position, locator in enumerate(task.locators):
        try:
            with one_sample(f"{task.source.path}, record {list(locator)}"):
                prepared.append((position, prepare_record(task.source, locator, task.options.limits)))
        except DataError as error:
            reject = {"shard": task.number, "record": list(locator), "kind": error.kind, "reason": str(error)}
            rejects.append(reject)
    writer = ShardWriter(task.path)
    try:
        for place in permutation(len(prepared), "prepare shard", task.options.seed, task.number):
            position, sample = prepared[place]
            images = [(image.extension, image.data) for image in sample.images]
            writer.add(f"{task.number:06d}-{position:06d}", sample.record, images)
        summary = writer.close()
    except BaseException:
        writer.abandon()
        raise
    num_images = sum(len(sample.images) for _, sample in prepared)
    report = {"summary": summary.as_dict(), "num_images": num_images, "rejects": rejects}
    done = task.path.parent / _PROGRESS / f"{task.path.stem}.json"
    partial = done.with_suffix(".partial")
    partial.write_text(json.dumps(report), encoding="utf-8")
    partial.replace(done)
    return len(task.locators)


def _finish(
    output: Path,
    reports: Sequence[dict[str, Any]],
    rejects: Sequence[dict[str, Any]],
    identity: str,
    options: ConvertOptions,
) -> dict[str, Any]:
    shards = [ShardSummary(**report["summary"]) for report in reports]
    write_energon_metadata(output, shards)
    manifest = {
        "version": _VERSION,
        "identity": identity,
        "options": asdict(options),
        "num_samples": sum(shard.num_samples for shard in shards),
        "num_images": sum(report["num_images"] for report in reports),
        "num_rejects": len(rejects),
        "rejects_by_kind": _by_kind(rejects),
        "shards": [shard.as_dict() for shard in shards],
    }
    partial = output / f"{MANIFEST}.partial"
    partial.write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    partial.replace(output / MANIFEST)
    return manifest
