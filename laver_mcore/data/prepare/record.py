"""One record of a published set -> one prepared sample: typed turns, checked images, ratings kept."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from laver_mcore.data.images.source import image_cells, read_image_bytes, read_parquet_row
from laver_mcore.data.prepare.transcode import ImageLimits, PreparedImage, prepare_image
from laver_mcore.data.records.finevision import RatingFilter, is_finevision, kept_turns, turn_ratings
from laver_mcore.data.records.sample import Sample, Turn
from laver_mcore.data.records.sources import JsonSource, ParquetSource, image_column
from laver_mcore.data.records.webdataset import WebDatasetSource


@dataclass(frozen=True)
class PreparedSample:
    """What goes into a shard: `{key}.json` and its images."""

    record: bytes
    images: tuple[PreparedImage, ...]


def prepare_record(
    source: JsonSource | ParquetSource | WebDatasetSource, locator: Sequence[int], limits: ImageLimits
) -> PreparedSample:
    """Read, check and re-encode one record; DataError with the reason for which it is rejected."""
    extra: dict[str, Any] = {"source": source.name}
    if isinstance(source, ParquetSource):
        number, group, row = locator
        columns = read_parquet_row(source.files[number], group, row)
        sample = source.parse(columns, number, group, row)
        encoded = image_cells(columns.get(image_column(columns)))
        extra = _extra(columns, source)
    else:
        sample = source.read(locator, check_files=True)
        encoded = [read_image_bytes(image) for image in sample.images]
    images = tuple(
        prepare_image(data, limits, str(image)) for data, image in zip(encoded, sample.images, strict=True)
    )
    return PreparedSample(_record(sample, images, extra), images)


def _extra(columns: dict[str, Any], source: ParquetSource) -> dict[str, Any]:
    extra: dict[str, Any] = {"source": columns.get("source") or columns.get("data_source") or source.name}
    if is_finevision(columns):
        kept = kept_turns(columns, source.ratings or RatingFilter())
        ratings = [turn_ratings(columns, number) for number in kept]
        if any(value is not None for rating in ratings for value in rating.values()):
            extra["ratings"] = ratings  # one a question, in order
    return extra


def _record(sample: Sample, images: Sequence[PreparedImage], extra: dict[str, Any]) -> bytes:
    record = {
        "key": sample.key,
        "turns": [{"role": turn.role, "content": _content(turn)} for turn in sample.turns],
        "images": [
            {"width": i.width, "height": i.height, "size": len(i.data), "blake2b": i.blake2b} for i in images
        ],
        **extra,
    }
    return json.dumps(record, ensure_ascii=False).encode()


def _content(turn: Turn) -> list[dict[str, str]]:
    """Typed parts: no placeholder is left to be mistaken for text, or text for a placeholder."""
    first, *rest = turn.split()
    parts = [{"type": "text", "text": first}] if first or not rest else []
    for piece in rest:
        parts.append({"type": "image"})
        if piece:
            parts.append({"type": "text", "text": piece})
    return parts
