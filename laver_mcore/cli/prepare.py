"""Convert LLaVA-Pretrain, LLaVA-OneVision or FineVision into prepared shards, or check a prepared set.

    laver prepare --input blip_laion_cc_sbu_558k.json --image-folder images --format llava --output DIR
    laver prepare --input finevision/ --format finevision --output DIR --min-relevance 3
    laver prepare --output DIR --check
    laver prepare --input data.json --format llava --report page.html --tokenizer models/Qwen2.5-7B-Instruct

Killed, it goes on where it stopped when it is started again with the same arguments.
"""

import argparse
import math
import os
from pathlib import Path
from typing import Any

from laver_mcore.cli.console import refuse
from laver_mcore.config.errors import ConfigError
from laver_mcore.config.flags import FlagParser, file_to_write, folder_to_write
from laver_mcore.data.errors import DataError
from laver_mcore.data.prepare.check import check_prepared
from laver_mcore.data.prepare.convert import REJECTS, ConvertOptions, Corpus, convert, open_corpus
from laver_mcore.data.prepare.survey import TextTokens, VisualTokens, survey
from laver_mcore.data.prepare.survey_page import survey_page
from laver_mcore.data.prepare.transcode import ImageLimits
from laver_mcore.data.records.finevision import RATINGS, RatingFilter


def _parser() -> FlagParser:
    parser = FlagParser(__doc__)
    parser.add_argument(
        "--input", type=Path, help="JSON / JSONL file; parquet, Arrow or tar file, or a folder of them"
    )
    parser.add_argument("--format", choices=("llava", "llava-onevision", "finevision", "webdataset"))
    parser.add_argument("--output", type=folder_to_write, help="folder of the prepared set")
    parser.add_argument("--image-folder", type=Path, help="what image paths are relative to (llava)")
    parser.add_argument("--check", action="store_true", help="read the prepared set whole and verify it")
    parser.add_argument(
        "--report",
        type=file_to_write,
        metavar="FILE",
        help="write a page about the set instead: sizes, rejects, duplicates",
    )
    parser.add_argument("--tokenizer", help="of the report's text lengths; characters where not given")
    parser.add_argument("--vision-path", help="directory of the tower whose visual tokens the report counts")
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
    if (args.report is None) == (args.output is None):
        parser.error("give --output, or --report and no --output")
    if args.report is None and (args.tokenizer or args.vision_path):
        parser.error("--tokenizer and --vision-path are of the --report")
    parser.want_at_least(1, args, "num_samples", "workers", "samples_per_shard", "max_pixels")
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
            if args.report is not None:
                _report(source, args, options)
                return 0
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
    except (ConfigError, DataError) as error:
        return refuse(error, status=1)
    return 0


def _report(source: Corpus, args: argparse.Namespace, options: ConvertOptions) -> None:
    text_tokens: TextTokens = len
    if args.tokenizer:
        from laver_mcore.data.sequence.tokenizer import load_tokenizer

        tokenizer = load_tokenizer(args.tokenizer)
        text_tokens = lambda text: len(tokenizer.encode(text))  # noqa: E731
    found = survey(
        source,
        limits=options.limits,
        num_samples=options.num_samples,
        seed=options.seed,
        text_tokens=text_tokens,
        visual_tokens=_visual_tokens(args.vision_path) if args.vision_path else None,
    )
    page = survey_page(source.name, found, text_unit="tokens" if args.tokenizer else "characters")
    args.report.write_text(page, encoding="utf-8")
    rejects = sum(reason.count for reason in found.reasons.values())
    print(f"{args.report}: {found.num_records:,} records, {rejects:,} rejected")


def _visual_tokens(path: str) -> VisualTokens:
    """Visual tokens of an image of a width and height, by the tower of a directory."""
    from laver_mcore.config.architecture import VisionConfig
    from laver_mcore.config.hugging_face import read_config_json
    from laver_mcore.config.schema import Config
    from laver_mcore.config.towers import towers_of_type
    from laver_mcore.train.build import build_image_processor

    towers = towers_of_type(read_config_json(path, "a vision tower's directory").get("model_type"))
    if not towers:
        raise ConfigError(f"{path}/config.json: describes no vision tower known here")
    processor = build_image_processor(Config(vision=VisionConfig(vision=towers[0].name, vision_path=path)))
    assert processor is not None
    return lambda width, height: math.prod(processor.grid(width, height))


def _summary(manifest: dict[str, Any], output: Path) -> str:
    kinds = ", ".join(f"{number:,} {kind}" for kind, number in manifest["rejects_by_kind"].items())
    return (
        f"{manifest['num_samples']:,} samples with {manifest['num_images']:,} images in "
        f"{len(manifest['shards'])} shards; {manifest['num_rejects']:,} rejected"
        + (f": {kinds} ({output / REJECTS})" if kinds else "")
    )
