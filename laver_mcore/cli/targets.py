"""Compute what VIRAL's frozen encoder sees in every image of a recipe, once, for `--target-cache`.

    laver prepare-targets --config RECIPE.yaml --output DIRECTORY
    laver prepare-targets --config RECIPE.yaml --output DIRECTORY --part 3/8     (0 to 7, side by side)

Stop it whenever you like: started again it goes on with what is missing. Images are told apart by their files' hashes,
so that one picture under two names is computed once. Further arguments are those of `laver train` and win over the
recipe.
"""

import argparse
import contextlib
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
from PIL import Image
from tqdm import tqdm

from laver_mcore.cli.console import refuse
from laver_mcore.config.errors import ConfigError
from laver_mcore.config.flags import FlagParser, folder_to_write
from laver_mcore.config.load import parse
from laver_mcore.config.schema import Config
from laver_mcore.data.errors import DataError
from laver_mcore.data.images.decode import decode_image
from laver_mcore.data.images.source import ImageSource, read_image_bytes
from laver_mcore.data.images.target_cache import Key, TargetCacheWriter, image_key
from laver_mcore.data.images.target_pixels import TargetProcessor, view_of
from laver_mcore.model.frozen_encoders import build_frozen_encoder
from laver_mcore.shapes.frozen import input_side
from laver_mcore.train.build import build_data, build_image_processor, build_tokenizer


class Encoder:
    """A recipe's frozen encoder with its pixels."""

    def __init__(self, config: Config) -> None:
        target = config.objective.target_encoder()
        if target is None or target.path is None:
            raise ConfigError(
                "the recipe has no frozen encoder; give --objective viral --target-path DIRECTORY"
            )
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        dtype = torch.bfloat16 if config.train.bf16 else torch.float32
        self._model = build_frozen_encoder(target, seed=config.train.seed, dtype=dtype, device=self._device)
        tower = build_image_processor(config)
        self._pixels = TargetProcessor(target.path, tower=tower, image_size=input_side(target))
        features_InZ, grid = self._model(self._pixels([Image.new("RGB", (64, 64))]).to(self._device))
        self.about: dict[str, Any] = dict(
            kind=target.kind,
            weights=self._model.digest(),
            dtype=str(dtype).removeprefix("torch."),
            pixels=self._pixels.fingerprint(),
            view=view_of(tower),
            grid=list(grid),
            width=features_InZ.shape[-1],
        )

    def __call__(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """Features [I, n, Z]."""
        features_InZ, _ = self._model(self._pixels(images).to(self._device))
        return features_InZ


class Loaded(NamedTuple):
    """An image whose features are missing; without a picture where they are not, or where it has a fault."""

    key: Key | None = None
    picture: Image.Image | None = None
    fault: str | None = None


def load(source: ImageSource, present: set[Key]) -> Loaded:
    try:
        encoded = read_image_bytes(source)
        key = image_key(encoded)
        return Loaded(key, None if key in present else decode_image(encoded, str(source)))
    except DataError as error:
        return Loaded(fault=str(error))


def batches(sources: Sequence[ImageSource], present: set[Key], size: int) -> Iterator[list[Loaded]]:
    """`size` images at a time, the next ones read meanwhile."""
    with ThreadPoolExecutor(4) as threads:
        ahead = None
        for start in range(0, len(sources), size):
            now, ahead = ahead, [threads.submit(load, s, present) for s in sources[start : start + size]]
            if now is not None:
                yield [future.result() for future in now]
        yield [future.result() for future in ahead or ()]


def fill(
    cache: TargetCacheWriter, encoder: Encoder, sources: Sequence[ImageSource], size: int
) -> tuple[int, int]:
    """Compute what is missing; returns how many images were computed, and how many could not be read."""
    computed = faults = 0
    bar = tqdm(total=len(sources), desc="encoding", unit=" images", dynamic_ncols=True)
    with contextlib.closing(cache), bar:
        for batch in batches(sources, cache.present, size):
            pictures: dict[Key, Image.Image] = {}
            for loaded in batch:
                if loaded.fault is not None:
                    faults += 1
                    bar.write(f"left out: {loaded.fault}", file=sys.stderr)
                if loaded.key is not None and loaded.picture is not None and loaded.key not in cache.present:
                    pictures[loaded.key] = loaded.picture
            if pictures:
                for key, features_nZ in zip(pictures, encoder(list(pictures.values())), strict=True):
                    cache.add(key, features_nZ)
            computed += len(pictures)
            bar.update(len(batch))
    return computed, faults


def parse_part(text: str) -> tuple[int, int]:
    index, _, number = text.partition("/")
    if not (index.isdigit() and number.isdigit() and int(index) < int(number)):
        raise argparse.ArgumentTypeError(f"{text!r} is not I/N with I from 0 to N - 1")
    return int(index), int(number)


def main(argv: list[str]) -> int:
    parser = FlagParser(__doc__)
    parser.add_argument(
        "--output", type=folder_to_write, required=True, help="the cache; made, or gone on with"
    )
    parser.add_argument(
        "--part", type=parse_part, default=(0, 1), metavar="I/N", help="every N-th image from I on"
    )
    parser.add_argument("--batch-size", type=int, default=32, help="images encoded at a time")
    parser.add_argument("--images-per-file", type=int, default=512)
    args, rest = parser.parse_known_args(argv)
    try:
        for name in ("batch_size", "images_per_file"):
            if getattr(args, name) < 1:
                raise ConfigError(f"--{name.replace('_', '-')} must be at least 1")
        config, _ = parse(rest)
        encoder = Encoder(config)
        index, number = args.part
        cache = TargetCacheWriter(
            args.output, encoder.about, part=index, images_per_file=args.images_per_file
        )
        data = build_data(config, build_tokenizer(config))
        samples = tqdm(range(len(data.samples)), desc="reading records", unit=" samples", dynamic_ncols=True)
        sources = list(dict.fromkeys(source for sample in samples for source in data.samples[sample].images))
        mine = sources[index::number]
        computed, faults = fill(cache, encoder, mine, args.batch_size)
    except (ConfigError, DataError, OSError) as error:
        return refuse(error)
    except KeyboardInterrupt:
        print("stopped; the same command goes on", file=sys.stderr)
        return 130
    grid = " x ".join(map(str, encoder.about["grid"]))
    print(
        f"{len(mine):,} images: {computed:,} computed, {len(mine) - computed - faults:,} were there or are the same, "
        f"{faults:,} left out; {grid} features of {encoder.about['width']} numbers each in {args.output}"
    )
    print(f"train with --target-cache {args.output}")
    return 0
