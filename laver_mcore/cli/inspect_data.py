"""Show what any step of a run saw: text, pictures with masks and token grids, packing fill, as HTML.

    laver inspect-data --config RECIPE.yaml --step 1200 --output step.html
    laver inspect-data --config RECIPE.yaml --skip-to 1200 --steps 3 --output steps.html

Everything is recomputed from the recipe: step k is a pure function of the seed, so nothing was recorded.
Further arguments are those of `laver train` and win over the recipe.
"""

import io
import itertools
from collections.abc import Iterator, Sequence
from html import escape
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from laver_mcore import page as html
from laver_mcore.cli.console import refuse
from laver_mcore.config.errors import ConfigError
from laver_mcore.config.flags import FlagParser, file_to_write
from laver_mcore.config.load import parse
from laver_mcore.config.schema import Config
from laver_mcore.data.errors import DataError
from laver_mcore.data.images.decode import open_image
from laver_mcore.data.images.processors import ImageProcessor
from laver_mcore.data.order.balance import imbalance
from laver_mcore.data.sequence.batch import Batch
from laver_mcore.data.sequence.prompt import IGNORE
from laver_mcore.data.sequence.tokenizer import Tokenizer
from laver_mcore.data.serve.loader import DialogueData
from laver_mcore.train.build import build_data, build_image_processor, build_tokenizer


def draw_picture(
    image: Image.Image, grid: tuple[int, int], mask: np.ndarray, longest: int = 320
) -> Image.Image:
    """The picture with its token grid, masked tokens painted red; `mask` is bool [rows * columns]."""
    scale = longest / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    canvas = image.resize(size).convert("RGBA")
    layer = Image.new("RGBA", canvas.size)
    pen = ImageDraw.Draw(layer)
    rows, columns = grid
    xs = [round(column * size[0] / columns) for column in range(columns + 1)]
    ys = [round(row * size[1] / rows) for row in range(rows + 1)]
    for token in np.flatnonzero(mask):
        row, column = divmod(int(token), columns)
        pen.rectangle((xs[column], ys[row], xs[column + 1], ys[row + 1]), fill=(220, 30, 30, 150))
    for x in xs:
        pen.line((x, 0, x, size[1]), fill=(255, 255, 255, 90))
    for y in ys:
        pen.line((0, y, size[0], y), fill=(255, 255, 255, 90))
    return Image.alpha_composite(canvas, layer).convert("RGB")


def document_html(tokens: Sequence[int], labels: Sequence[int], tokenizer: Tokenizer) -> str:
    """A document's text, what is learned marked, runs of visual tokens counted."""
    pad = tokenizer.special.image_pad
    parts: list[str] = []
    run: list[int] = []
    kind: Any = None

    def flush() -> None:
        if run and kind == "image":
            parts.append(f"<b>[{len(run)} visual tokens]</b>")
        elif run:
            text = escape(tokenizer.decode(run, skip_special_tokens=False))
            parts.append(f"<mark>{text}</mark>" if kind == "learned" else text)
        run.clear()

    for position, token in enumerate(tokens):
        learned = position > 0 and labels[position - 1] != IGNORE  # labels are those of the next token
        now = "image" if token == pad else "learned" if learned else "given"
        if now != kind:
            flush()
            kind = now
        run.append(int(token))
    flush()
    return "".join(parts)


def batch_html(
    batch: Batch, members: Sequence[int], data: DialogueData, config: Config, step: int
) -> Iterator[str]:
    """One micro-batch that holds the samples `members`: fill, then each document."""
    tokenizer, processor = build_tokenizer(config), build_image_processor(config)
    used, total = sum(batch.document_lengths), len(batch.tokens_T)
    yield f"<p>{used:,} of {total:,} tokens ({used / total:.1%}), {batch.num_samples} documents, "
    lengths = zip(map(data.samples.key, members), batch.document_lengths, strict=True)
    yield f"{batch.num_images} images</p>{html.bar({**dict(lengths), 'padding': total - used})}"
    start = 0
    images = iter(zip(batch.image_keys, batch.image_grids, strict=True))
    for number, length in zip(members, batch.document_lengths, strict=True):
        stop = start + length
        tokens, labels = batch.tokens_T[start:stop].tolist(), batch.labels_T[start:stop].tolist()
        yield f"<h4>{escape(data.samples.key(number))}: {length} tokens</h4>"
        yield f"<pre>{document_html(tokens, labels, tokenizer)}</pre>"
        for source in data.samples[number].images:
            (key, index), grid = next(images)
            assert processor is not None
            picture = as_seen(open_image(source), processor)
            mask = _mask(config, grid, key, index, step)
            yield _picture_html(draw_picture(picture, grid, mask), key, index, mask)
        start = stop


def balance_html(data: DialogueData, step: int, sizes: dict[str, int]) -> str:
    """How much longer the slowest of so many data-parallel ranks is expected to take than their mean."""
    parts = []
    for dp_size in (2, 4, 8, 16, 32, 64):
        if sizes["global_batch_size"] % (sizes["micro_batch_size"] * dp_size) == 0:
            ranks = data.step_rows(step, dp_size=dp_size, **sizes)
            loads = [sum(data.row_cost(row) for rows in of_rank for row in rows) for of_rank in ranks]
            parts.append(f"DP {dp_size}: {imbalance(loads):.1%}")
    if not parts:
        return ""
    return f"<p>predicted imbalance of ranks (slowest / mean - 1): {', '.join(parts)}</p>"


def as_seen(image: Image.Image, processor: ImageProcessor) -> Image.Image:
    """The picture resized and cropped as the processor does."""
    settings = processor.settings
    height, width = settings.target(*image.size)
    image = image.resize((width, height))
    if settings.crop is None:
        return image
    rows, columns = settings.crop
    top, left = (height - rows) // 2, (width - columns) // 2
    return image.crop((left, top, left + columns, top + rows))


def _mask(config: Config, grid: tuple[int, int], key: str, index: int, step: int) -> np.ndarray:
    num = grid[0] * grid[1]
    found = config.objective.mask(config, num, key=key, image_index=index, iteration=step)
    return np.zeros(num, dtype=bool) if found is None else found


def _picture_html(picture: Image.Image, key: str, index: int, mask: np.ndarray) -> str:
    file = io.BytesIO()
    picture.save(file, "PNG")
    return html.image(
        file.getvalue(), f"{key}, image {index}: {int(mask.sum())} of {mask.size} tokens masked"
    )


def step_html(
    config: Config, data: DialogueData, step: int, micro_batches: int | None = None
) -> Iterator[str]:
    """What a step saw, in its first `micro_batches` (all by default); steps are counted from 0, as rows are taken."""
    sizes = {
        "global_batch_size": config.train.global_batch_size,
        "micro_batch_size": config.train.micro_batch_size,
    }
    yield html.heading(f"Step {step} (iteration {step + 1})")
    (rows,) = data.step_rows(step, **sizes)
    yield balance_html(data, step, sizes)
    for number, batch in enumerate(itertools.islice(data.step_batches(step, **sizes), micro_batches)):
        yield f"<h3>Micro-batch {number}</h3>"
        members = [member for row in rows[number] for member in data.row(row)]
        yield from batch_html(batch, members, data, config, step)


def page(config: Config, steps: range) -> str:
    """The whole page."""
    data = build_data(config, build_tokenizer(config))
    return html.document(
        f"Steps {steps.start} to {steps.stop - 1}", [p for k in steps for p in step_html(config, data, k)]
    )


def main(argv: list[str]) -> int:
    """Returns the exit status: 0, or 1 for a recipe or data that cannot be used."""
    parser = FlagParser(__doc__)
    parser.add_argument("--step", "--skip-to", type=int, default=0, dest="step", help="first step, from 0")
    parser.add_argument("--steps", type=int, default=1, help="how many")
    parser.add_argument("--output", type=file_to_write, required=True, help="HTML file to write")
    args, rest = parser.parse_known_args(argv)
    parser.want_at_least(0, args, "step")
    parser.want_at_least(1, args, "steps")
    try:
        config, _ = parse(rest)
        text = page(config, range(args.step, args.step + args.steps))
    except (ConfigError, DataError) as error:
        return refuse(error, status=1)
    args.output.write_text(text, encoding="utf-8")
    print(f"{args.output}: {len(text) / 2**20:.1f} MiB")
    return 0
