"""Convert LLaVA-Pretrain, LLaVA-OneVision or FineVision into prepared shards, or check a prepared set.

    laver prepare --input blip_laion_cc_sbu_558k.json --image-folder images --format llava --output DIR
    laver prepare --input finevision/ --format finevision --output DIR --min-relevance 3
    laver prepare --output DIR --check

Killed, it goes on where it stopped when it is started again with the same arguments.
"""

import argparse
import os
from pathlib import Path
from typing import Any

from laver_mcore.cli.console import refuse
from laver_mcore.config.flags import FlagParser, folder_to_write
from laver_mcore.data.errors import DataError
from laver_mcore.data.prepare.check import check_prepared
from laver_mcore.data.prepare.convert import REJECTS, ConvertOptions, convert, open_corpus
from laver_mcore.data.prepare.transcode import ImageLimits
from laver_mcore.data.records.finevision import RATINGS, RatingFilter


def _parser() -> argparse.ArgumentParser:
    parser = FlagParser(__doc__)
    parser.add_argument(
        "--input", type=Path, help="JSON / JSONL file; parquet, Arrow or tar file, or a folder of them"
    )
    parser.add_argument("--format", choices=("llava", "llava-onevision", "finevision", "webdataset"))
    parser.add_argument("--output", type=folder_to_write, required=True, help="folder of the prepared set")
    parser.add_argument("--image-folder", type=Path, help="what image paths are relative to (llava)")
    parser.add_argument("--check", action="store_true", help="read the prepared set whole and verify it")
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count() or 1, help="processes (default: all cores)"
    )
    parser.add_argument("--samples-per-shard", type=int, default=2000)
    parser.add_argument(
        "--num-samples", type=int, help="draw so many records at random, before any is rejected"
    )
    parser.add_argument("--seed", type=int, default=0, help="of that draw and of the one global shuffle")
    parser.add_argument(
        "--max-pixels", type=int, default=ImageLimits.max_pixels, help="scale larger images down"
    )
    parser.add_argument("--max-aspect", type=float, default=ImageLimits.max_aspect, help="reject beyond this")
    parser.add_argument(
        "--max-bad-fraction", type=float, default=0.1, help="share of records that may be rejected"
    )
    parser.add_argument(
        "--allow-outside-images", action="store_true", help="image names may lead out of --image-folder"
    )
    for name in RATINGS:
        flag = f"--min-{name.replace('_', '-')}"
        parser.add_argument(flag, type=int, help="keep FineVision turns rated at least this, 1 to 5")
    return parser


def main(argv: list[str]) -> int:
    """Returns the exit status: 0, 1 for bad data, 2 for bad arguments."""
    parser = _parser()
    args = parser.parse_args(argv)
    if not args.check and (args.input is None or args.format is None):
        parser.error("give --input and --format, or --check")
    for name in ("num_samples", "workers", "samples_per_shard", "max_pixels"):
        if (value := getattr(args, name)) is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} {value} is not at least 1")
    if not args.max_aspect >= 1:
        parser.error(f"--max-aspect {args.max_aspect} is not at least 1")
    if not 0 <= args.max_bad_fraction <= 1:
        parser.error(f"--max-bad-fraction {args.max_bad_fraction} is not between 0 and 1")
    try:
        if args.input is not None:
            ratings = {name: getattr(args, f"min_{name}") for name in RATINGS}
            options = ConvertOptions(
                format=args.format,
                seed=args.seed,
                samples_per_shard=args.samples_per_shard,
                num_samples=args.num_samples,
                limits=ImageLimits(max_pixels=args.max_pixels, max_aspect=args.max_aspect),
                ratings=RatingFilter(**ratings),
            )
            source = open_corpus(
                args.input, args.image_folder, options, allow_outside_images=args.allow_outside_images
            )
            manifest = convert(
                source,
                args.output,
                options,
                num_workers=args.workers,
                max_bad_fraction=args.max_bad_fraction,
            )
            print(_summary(manifest, args.output))
        if args.check:
            problems = check_prepared(args.output, num_workers=args.workers)
            print("\n".join(problems) if problems else f"{args.output}: in order")
            return 1 if problems else 0
    except DataError as error:
        return refuse(error, status=1)
    return 0


def _summary(manifest: dict[str, Any], output: Path) -> str:
    kinds = ", ".join(f"{number:,} {kind}" for kind, number in manifest["rejects_by_kind"].items())
    return (
        f"{manifest['num_samples']:,} samples with {manifest['num_images']:,} images in "
        f"{len(manifest['shards'])} shards; {manifest['num_rejects']:,} rejected"
        + (f": {kinds} ({output / REJECTS})" if kinds else "")
    )
