"""Write the demo's data: pages of real digit scans and photographs, conversations about them, a tokenizer.

python tools/prepare_demo.py --output data/demo

data/demo/images/{named,unnamed,heldout}/*.jpg   the pages, 48 x 48 pixels
data/demo/align.json     stage 1: named pages read out
data/demo/train.json     stage 2: the same, and captions of unnamed pages
data/demo/instruct.json  stage 3: rows, columns and single digits of named pages
data/demo/heldout.json   pages read out whose scans appear in no other file

Text is sparse, as in real corpora: named pages are made of 150 scans, unnamed ones of all 1,497, or of a photograph,
and nobody says what stands on them.
data/demo/tokenizer.model                SentencePiece, trained on the text of all of them
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from laver_mcore.config.flags import FlagParser
from laver_mcore.demo.conversations import (
    Turns,
    caption_turns,
    dense_turns,
    llava_record,
    vague_turns,
)
from laver_mcore.demo.pages import (
    NUM_NAMED_SCANS,
    PAGE_SIDE_PIXELS,
    Page,
    digit_page,
    load_photographs,
    load_scans,
    photograph_page,
)
from laver_mcore.demo.tokenizer import train_tokenizer

JPEG_QUALITY = 95


def compose_pages(
    counts: dict[str, int], photograph_share: float, page_side: int, num_named_scans: int, seed: int
) -> dict[str, list[Page]]:
    """The pages of every kind, so many of each; a share of the unnamed ones are photographs."""
    photographs = load_photographs()
    training, heldout = load_scans(page_side=page_side)
    scans = {"named": training.first(num_named_scans), "unnamed": training, "heldout": heldout}
    pages: dict[str, list[Page]] = {}
    for number, (kind, count) in enumerate(counts.items()):
        rng = np.random.default_rng([seed, number])
        share = photograph_share if kind == "unnamed" else 0.0
        is_photograph = rng.permutation(count) < round(count * share)
        pages[kind] = [
            photograph_page(photographs, rng, page_side=page_side)
            if photograph
            else digit_page(scans[kind], rng, page_side=page_side)
            for photograph in is_photograph
        ]
    return pages


def write_images(pages: dict[str, list[Page]], output: Path) -> dict[str, list[str]]:
    """Write every page as JPEG and return the paths relative to `output`, in order."""
    names: dict[str, list[str]] = {}
    for split, members in pages.items():
        (output / "images" / split).mkdir(parents=True)
        names[split] = [f"images/{split}/{index:05d}.jpg" for index in range(len(members))]
        for name, page in zip(names[split], members, strict=True):
            # 4:4:4, as colour at half resolution blurs one-pixel strokes of coloured ink.
            Image.fromarray(page.picture).save(output / name, quality=JPEG_QUALITY, subsampling=0)
    return names


def write_conversations(
    pages: dict[str, list[Page]], names: dict[str, list[str]], output: Path, seed: int
) -> list[str]:
    """Write the four JSON files and return every text in them."""
    rng = np.random.default_rng([seed, len(pages)])
    files: dict[str, dict[str, Callable[[Page], Turns]]] = {
        "align": {"named": caption_turns},
        "train": {"named": caption_turns, "unnamed": vague_turns},
        "instruct": {"named": lambda page: dense_turns(page, rng)},
        "heldout": {"heldout": caption_turns},
    }
    texts: list[str] = []
    for file, kinds in files.items():
        records: list[dict[str, object]] = []
        for kind, ask in kinds.items():
            for page, image in zip(pages[kind], names[kind], strict=True):
                turns = ask(page)
                texts += [text for turn in turns for text in turn]
                records.append(llava_record(f"{file}-{len(records):05d}", image, turns))
        (output / f"{file}.json").write_text(json.dumps(records, indent=0), encoding="utf-8")
    return texts


def prepare(
    output: Path,
    *,
    num_pages: int = 6000,
    num_heldout: int = 240,
    photograph_share: float = 0.06,
    page_side: int = PAGE_SIDE_PIXELS,
    num_named_scans: int = NUM_NAMED_SCANS,
    seed: int = 0,
) -> int:
    """Write everything under `output`, in place of what an earlier call wrote; return the vocabulary size."""
    shutil.rmtree(output / "images", ignore_errors=True)
    output.mkdir(parents=True, exist_ok=True)
    counts = {"named": -(-num_pages // 2), "unnamed": num_pages // 2, "heldout": num_heldout}
    pages = compose_pages(counts, photograph_share, page_side, num_named_scans, seed)
    texts = write_conversations(pages, write_images(pages, output), output, seed)
    return train_tokenizer(texts, output / "tokenizer.model")


def main() -> None:
    parser = FlagParser(__doc__)
    parser.add_argument(
        "--output", type=Path, default=Path("data/demo"), help="folder to write (default: data/demo)"
    )
    parser.add_argument(
        "--pages", type=int, default=6000, help="training pages, half of them named (default: 6000)"
    )
    parser.add_argument("--heldout", type=int, default=240, help="held-out pages (default: 240)")
    parser.add_argument("--page-side", type=int, default=PAGE_SIDE_PIXELS, help="pixels (default: 48)")
    parser.add_argument(
        "--named-scans",
        type=int,
        default=NUM_NAMED_SCANS,
        help="scans that the text ever names (default: 150)",
    )
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    for flag in ("pages", "heldout", "named_scans"):
        if getattr(arguments, flag) < 1:
            parser.error(f"--{flag.replace('_', '-')} {getattr(arguments, flag)}: give at least one")
    try:
        vocab_size = prepare(
            arguments.output,
            num_pages=arguments.pages,
            num_heldout=arguments.heldout,
            page_side=arguments.page_side,
            num_named_scans=arguments.named_scans,
            seed=arguments.seed,
        )
    except (ValueError, OSError, ImportError) as error:
        fix = "; pip install 'laver-mcore[demo]'" if isinstance(error, ImportError) else ""
        parser.exit(2, f"prepare_demo: {error}{fix}\n")
    print(
        f"{arguments.output}: {arguments.pages} pages, {arguments.heldout} held out, {vocab_size} token ids"
    )


if __name__ == "__main__":
    main()
