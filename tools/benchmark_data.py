"""Images per second of every image backend against DataLoader + Pillow + transformers, interleaved.

    python tools/benchmark_data.py --cores 2 --rounds 5
    python tools/benchmark_data.py --images FOLDER --preprocessor CHECKPOINT
    python tools/benchmark_data.py --device cuda      # DALI on the GPU
    python tools/benchmark_data.py --memory 20000     # resident memory while samples pass through the loader
    python tools/benchmark_data.py --json 250000      # memory and time up to the first batch of a JSON file of 300 MB

Only the ratios of one run mean something: every round measures every path once, and medians are compared.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image

from laver_mcore.config.decoders.templates import CHATML
from laver_mcore.config.flags import FlagParser
from laver_mcore.data.images import dali
from laver_mcore.data.images.backends import BACKENDS, make_backend
from laver_mcore.data.images.decode import image_size, open_image
from laver_mcore.data.images.processors import FixedImageProcessor, PatchImageProcessor
from laver_mcore.data.images.wanted import WantedImage
from laver_mcore.data.sequence.chat import ChatFormat
from laver_mcore.data.sequence.tokenizer import SpecialTokens, load_tokenizer
from laver_mcore.data.serve.loader import DialogueData

SIGLIP_384 = {
    "image_processor_type": "SiglipImageProcessor",
    "size": {"height": 384, "width": 384},
    "resample": 3,
    "image_mean": [0.5] * 3,
    "image_std": [0.5] * 3,
}


def write_photographs(folder: Path, count: int, width: int = 640, height: int = 480) -> list[Path]:
    """Noisy smooth JPEGs, about as large on disk as photographs of that size."""
    draw = np.random.default_rng(0)
    paths = []
    for number in range(count):
        coarse = draw.integers(0, 256, (15, 20, 3), dtype=np.uint8)
        smooth = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
        noise = draw.normal(0, 12, (height, width, 3))
        pixels = (np.asarray(smooth) + noise).clip(0, 255).astype(np.uint8)
        paths.append(folder / f"{number}.jpg")
        Image.fromarray(pixels).save(paths[-1], quality=85)
    return paths


class _Files(torch.utils.data.Dataset):
    """What a LLaVA-style trainer does for each image."""

    def __init__(self, paths: Sequence[Path], processor: FixedImageProcessor) -> None:
        self._paths, self._processor = paths, processor

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, number: int) -> torch.Tensor:
        return self._processor([open_image(self._paths[number])])[0]


def baseline(
    paths: Sequence[Path], processor: FixedImageProcessor, cores: int, batch: int
) -> Callable[[], int]:
    """DataLoader with one worker a core, kept alive between rounds."""
    loader: Any = torch.utils.data.DataLoader(
        _Files(paths, processor),
        batch_size=batch,
        num_workers=cores,
        persistent_workers=True,
        multiprocessing_context=multiprocessing.get_context("spawn"),
    )
    return lambda: sum(len(pixels) for pixels in loader)


def ours(
    name: str,
    paths: Sequence[Path],
    processor: FixedImageProcessor,
    cores: int,
    batch: int,
    device: torch.device,
) -> Callable[[], int]:
    """One backend of this engine, in this process, with one thread a core."""
    maker = make_backend(name, processor, num_threads=cores, device=device)
    wanted = [WantedImage(path, *image_size(path)) for path in paths]

    def run() -> int:
        done = 0
        for start in range(0, len(wanted), batch):
            pixels, failures = maker(wanted[start : start + batch])
            assert not failures
            done += len(pixels)
        return done

    return run


def compare(args: argparse.Namespace, paths: Sequence[Path]) -> dict[str, float]:
    """Median images per second of each path."""
    source = args.preprocessor if args.preprocessor else SIGLIP_384
    processor = FixedImageProcessor(source, patch_size=args.patch_size)
    names = [name for name in BACKENDS if dali.installed() or not name.startswith("dali")]
    runs = {"DataLoader + Pillow + Hugging Face": baseline(paths, processor, args.cores, args.batch)}
    device = torch.device(args.device, 0) if args.device == "cuda" else torch.device("cpu")
    runs |= {name: ours(name, paths, processor, args.cores, args.batch, device) for name in names}
    rates: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()  # processes start, caches fill
    for number in range(args.rounds):
        for name, run in runs.items():
            started = time.perf_counter()
            done = run()
            rates[name].append(done / (time.perf_counter() - started))
        print(f"round {number + 1} of {args.rounds}", flush=True)
    return {name: statistics.median(found) for name, found in rates.items()}


class _Bytes:
    """A tokenizer of bytes, so that the memory run needs no files of anybody."""

    special = SpecialTokens(
        end_of_turn=257, vision_start=258, image_pad=259, vision_end=260, eos=257, pad=261
    )
    chat = ChatFormat(CHATML, {"<|im_start|>": 256, "<|im_end|>": 257}, {}, "bytes")
    added: ClassVar[dict[str, int]] = {}
    vocab_size = 262

    def encode(self, text: str, *, after: str | None = None) -> list[int]:
        return list(text.encode())

    def decode(self, ids: Any, *, skip_special_tokens: bool = True) -> str:
        return bytes(i for i in ids if i < 256).decode(errors="replace")

    def fingerprint(self) -> str:
        return "bytes"


def memory(num_samples: int, folder: Path, paths: Sequence[Path], backend: str) -> list[tuple[int, float]]:
    """Resident MiB of this process after every tenth of `num_samples` samples."""
    import psutil

    turns = [
        {"from": "human", "value": "<image>\nWhat is this?"},
        {"from": "gpt", "value": "A pattern. " * 9},
    ]
    records = [
        {"id": str(n), "image": paths[n % len(paths)].name, "conversations": turns}
        for n in range(num_samples)
    ]
    (folder / "train.json").write_text(json.dumps(records))
    data = DialogueData(
        folder / "train.json",
        tokenizer=_Bytes(),
        image_processor=PatchImageProcessor(image_size=128, patch_size=16),
        seq_length=2048,
        seed=0,
        image_backend=backend,
        image_cache_mib=16,
    )
    found, seen, mark = [], 0, num_samples // 10
    for batches in data.iterate(0, 10**9, global_batch_size=8, micro_batch_size=8, image_share=(0, 1)):
        seen += sum(batch.num_samples for batch in batches)
        if seen >= mark:
            found.append((seen, psutil.Process().memory_info().rss / 2**20))
            print(f"{seen:,} samples: {found[-1][1]:.0f} MiB", flush=True)
            mark += num_samples // 10
        if seen >= num_samples:
            break
    return found


class _Peak(threading.Thread):
    """The most memory that this process and those below it had together; pages that they share count once (PSS)."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.mib, self._over = 0.0, threading.Event()

    def run(self) -> None:
        import psutil

        own = psutil.Process()
        while not self._over.wait(0.2):
            total = 0
            for process in (own, *own.children(recursive=True)):
                with contextlib.suppress(psutil.Error, OSError):  # one that has just ended
                    total += process.memory_full_info().pss
            self.mib = max(self.mib, total / 2**20)

    def stop(self) -> float:
        """Look no more; returns the peak in MiB."""
        self._over.set()
        self.join()
        return self.mib


def first_batch(num_records: int, folder: Path, paths: Sequence[Path], tokenizer: Any) -> None:
    """Print memory and time from a JSON file of records of 1.2 KB to the first batch, lengths measured by workers."""
    file = folder / "train.json"
    words = [
        f"The {colour} shape {n} stands left of the other one."
        for n in range(8)
        for colour in ("red", "dark")
    ]
    draw = np.random.default_rng(0)
    with file.open("w", encoding="utf-8") as out:
        for n in range(num_records):
            said = " ".join(words[i] for i in draw.integers(0, len(words), 24))
            turns = [{"from": "human", "value": "<image>\nWhat is this?"}, {"from": "gpt", "value": said}]
            record = {"id": f"record-{n}", "image": paths[n % len(paths)].name, "conversations": turns}
            out.write(("[" if n == 0 else ",\n") + json.dumps(record))
        out.write("]")
    size = file.stat().st_size / 2**20
    peak, started = _Peak(), time.perf_counter()
    peak.start()
    data = DialogueData(
        file,
        tokenizer=tokenizer,
        image_processor=PatchImageProcessor(image_size=128, patch_size=16),
        seq_length=4096,
        seed=0,
        num_workers=2,
    )
    indexed = time.perf_counter() - started
    with contextlib.closing(
        data.iterate(0, 1, global_batch_size=8, micro_batch_size=1, image_share=(0, 1))
    ) as steps:
        next(iter(steps))
    taken = time.perf_counter() - started
    most = peak.stop()
    print(
        f"{num_records:,} records, {size:.0f} MiB: at most {most:.0f} MiB of memory, {most / size:.2f} of the file"
    )
    print(f"lengths after {indexed:.1f} s, the first batch after {taken:.1f} s")


def _photographs(args: argparse.Namespace, folder: Path) -> list[Path]:
    if args.images is None:
        return write_photographs(folder, args.count)
    paths = sorted(
        path for path in args.images.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg", ".png")
    )
    return paths[: args.count]


def main() -> None:
    parser = FlagParser(__doc__)
    parser.add_argument(
        "--images", type=Path, help="folder of JPEG and PNG files (default: 640 x 480 made up)"
    )
    parser.add_argument("--count", type=int, default=128, help="images of a round")
    parser.add_argument("--preprocessor", type=Path, help="preprocessor_config.json (default: SigLIP 384)")
    parser.add_argument("--patch-size", type=int, default=14)
    parser.add_argument("--cores", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cpu", help="where the DALI backends decode and resize"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--memory", type=int, metavar="SAMPLES", help="measure memory instead")
    parser.add_argument("--json", type=int, metavar="RECORDS", help="measure a large JSON file instead")
    parser.add_argument("--tokenizer", help="of the large file: directory or .model file (default: bytes)")
    parser.add_argument("--backend", choices=BACKENDS, default="torch_uint8", help="of the memory run")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda needs a CUDA GPU; leave it out to measure the CPU backends")
    torch.set_num_threads(1)  # one image a thread; threads within an image only get in each other's way
    with tempfile.TemporaryDirectory() as folder:
        paths = _photographs(args, Path(folder))
        if args.memory:
            memory(args.memory, Path(folder), paths, args.backend)
            return
        if args.json:
            first_batch(
                args.json, Path(folder), paths, load_tokenizer(args.tokenizer) if args.tokenizer else _Bytes()
            )
            return
        rates = compare(args, paths)
    reference = next(iter(rates.values()))
    print(f"\n| path ({args.cores} cores, median of {args.rounds}) | images/s | ratio |\n|---|---:|---:|")
    for name, rate in rates.items():
        print(f"| {name} | {rate:.0f} | {rate / reference:.2f} |")


if __name__ == "__main__":
    main()
