"""A prepared set, read whole: hashes, indices, records, and every pixel."""

import hashlib
import json
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from laver_mcore.data.errors import DataError
from laver_mcore.data.images.decode import decode_image
from laver_mcore.data.images.source import read_image_bytes
from laver_mcore.data.records.shards import MANIFEST, ShardSummary, read_members, record_offsets
from laver_mcore.data.records.sources import ShardSource


@dataclass(frozen=True)
class _ShardCheck:
    folder: Path
    number: int
    summary: ShardSummary


def check_prepared(folder: Path, *, num_workers: int = 1) -> list[str]:
    """One line for everything that is wrong with a prepared set; empty when nothing is."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        tasks = [
            _ShardCheck(folder, number, ShardSummary(**shard))
            for number, shard in enumerate(manifest["shards"])
        ]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return [f"{folder / MANIFEST}: no manifest ({str(error).splitlines()[0]}); the set is not finished"]
    problems = []
    with tqdm(total=manifest["num_samples"], desc="checking", unit=" samples", disable=None) as bar:
        if num_workers <= 1:
            for task in tasks:
                problems += _check_shard(task)
                bar.update(task.summary.num_samples)
        else:
            spawn = multiprocessing.get_context("spawn")
            with ProcessPoolExecutor(num_workers, mp_context=spawn) as pool:
                for task, found in zip(tasks, pool.map(_check_shard, tasks), strict=True):
                    problems += found
                    bar.update(task.summary.num_samples)
    return problems


def _check_shard(task: _ShardCheck) -> list[str]:
    shard = task.folder / task.summary.name
    try:
        with shard.open("rb") as file:
            digest = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
        if digest != task.summary.blake2b:
            return [f"{shard}: its hash is not the manifest's; prepare or copy the shard again"]
        return _check_samples(task, shard)
    except (OSError, DataError) as error:
        return [str(error)]


def _check_samples(task: _ShardCheck, shard: Path) -> list[str]:
    """The index against the archive, and every image against its record."""
    problems = []
    source = ShardSource(task.folder)
    offsets = list(record_offsets(shard))
    names = [name for name, _ in read_members(shard)]
    num_members = 0
    for offset, size in offsets:
        sample = source.read((task.number, offset, size))
        num_members += 1 + len(sample.images)
        for image in sample.images:
            try:
                picture = decode_image(read_image_bytes(image), str(image))
                wanted = (image.width, image.height)  # type: ignore[union-attr]
                if picture.size != wanted:
                    problems.append(f"{image}: is {picture.size}, its record says {wanted}")
            except DataError as error:
                problems.append(str(error))
    if len(offsets) != task.summary.num_samples or len(names) != num_members:
        problems.append(f"{shard}: {len(names)} members, {len(offsets)} samples; the index does not fit")
    return problems
