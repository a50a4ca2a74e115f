"""NVIDIA DALI's dynamic mode: batch decode and batch resize, on CPU or GPU. The only file that imports DALI.

Measured on DALI 2.4.0: JPEG and PNG decode to Pillow's very bits; one damaged image fails its whole batch, dozens in a
batch of 128 end the process; grey PNGs of 16 bits and CMYK without Adobe's marker come out otherwise than anywhere
else, and GIF and AVIF not at all, so Pillow decodes those, and whatever EXIF wants turned.
"""

import importlib
import importlib.util
import io
import re
import struct
import threading
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from laver_mcore.data.images.decode import DECODE_ERRORS, orientation

_PNG = b"\x89PNG\r\n\x1a\n"


@lru_cache
def installed() -> bool:
    """Whether DALI can be imported; nothing is imported for the answer."""
    try:
        return importlib.util.find_spec("nvidia.dali") is not None
    except ModuleNotFoundError:
        return False


class _Dynamic:
    """DALI's dynamic mode; the first user decides on its threads.

    Measured on DALI 2.4.0: a decoder that ran before `set_num_threads` was called with another number never
    returns from its next batch.
    """

    def __init__(self) -> None:
        self._module: Any = None
        self._lock = threading.Lock()

    def __call__(self, num_threads: int) -> Any:
        with self._lock:
            if self._module is None:
                module = importlib.import_module("nvidia.dali.experimental.dynamic")
                module.set_num_threads(num_threads)
                self._module = module
            return self._module


_dynamic = _Dynamic()


_START_OF_SCAN, _END_OF_IMAGE = 0xDA, 0xD9
_ALL_COEFFICIENTS = b"\x00\x3f\x00"
"""What a scan of a sequential file has in it: the first to the last, in full precision."""
_AFTER_SCAN = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")
"""A marker that ends entropy-coded data: neither a stuffed zero, nor a restart, nor fill."""


def decodes(encoded: bytes) -> bool:
    """Whether DALI gives the reference's pixels: an upright JPEG in colour or grey, or opaque PNG of 8 bits.

    What DALI makes of CMYK depends on an Adobe marker that not every file has.
    """
    is_png = encoded[:8] == _PNG
    if not is_png and encoded[:3] != b"\xff\xd8\xff":
        return False
    try:
        with Image.open(io.BytesIO(encoded)) as image:
            if orientation(image) != 1:
                return False
            if not is_png:
                return image.mode in ("RGB", "L") and _is_whole(encoded)
    except DECODE_ERRORS:
        return False
    bits, colour = encoded[24], encoded[25]
    return bits <= 8 and colour in (0, 2, 3) and not _has_transparency(encoded)


def _is_whole(jpeg: bytes) -> bool:
    """Whether segment follows segment to the end, one scan in a sequential file.

    DALI passes over much that libjpeg, by which the reference reads, refuses.
    """
    position, sequential, scans = 2, False, 0
    while position + 4 <= len(jpeg) and jpeg[position] == 0xFF:
        marker = jpeg[position + 1]
        if marker == 0xFF:  # fill
            position += 1
            continue
        if not (0xC0 <= marker <= 0xCF or 0xDA <= marker <= 0xEF or marker == 0xFE):
            return False
        sequential |= marker in (0xC0, 0xC1)
        position += 2 + int.from_bytes(jpeg[position + 2 : position + 4])
        if marker == _START_OF_SCAN:
            scans += 1
            found = _AFTER_SCAN.search(jpeg, position)
            if found is None or (
                sequential and (scans > 1 or jpeg[position - 3 : position] != _ALL_COEFFICIENTS)
            ):
                return False
            position = found.start()
            if jpeg[position + 1] == _END_OF_IMAGE:
                return True
    return False


def _has_transparency(png: bytes) -> bool:
    """Whether a tRNS chunk stands before the pixels."""
    position = 8
    while position + 8 <= len(png):
        length, kind = struct.unpack(">I4s", png[position : position + 8])
        if kind in (b"tRNS", b"IDAT"):
            return kind == b"tRNS"
        position += 12 + length
    return False


def decode(encoded: Sequence[bytes], num_threads: int) -> list[np.ndarray | None]:
    """uint8 [H, W, 3] of each image; None for one that DALI cannot or should not decode."""
    if not installed():
        return [None] * len(encoded)
    return _isolated(encoded, lambda batch: _decode_on_cpu(batch, num_threads))


T = TypeVar("T")


def _isolated(encoded: Sequence[bytes], decode_batch: Callable[[list[bytes]], list[T]]) -> list[T | None]:
    """What `decode_batch` makes of the images that DALI should decode: of all at once, and one by one if that fails."""
    decoded: list[T | None] = [None] * len(encoded)
    ours = [position for position, data in enumerate(encoded) if decodes(data)]
    if not ours:
        return decoded
    try:
        images = decode_batch([encoded[position] for position in ours])
        for position, image in zip(ours, images, strict=True):
            decoded[position] = image
    except RuntimeError:
        for position in ours:
            try:
                decoded[position] = decode_batch([encoded[position]])[0]
            except RuntimeError:
                continue  # Pillow has the last word, and the better message
    return decoded


def _decode_on_cpu(encoded: list[bytes], num_threads: int) -> list[np.ndarray]:
    dynamic = _dynamic(num_threads)
    batch = dynamic.as_batch([np.frombuffer(data, dtype=np.uint8) for data in encoded])
    images = dynamic.decoders.image(batch, device="cpu", adjust_orientation=False)
    return [np.asarray(image) for image in images.evaluate().tensors]


def resize(
    images: Sequence[np.ndarray],
    targets: Sequence[tuple[int, int]],
    resample: str,
    two_pass: bool,
    num_threads: int,
) -> list[np.ndarray]:
    """Antialiased resize of uint8 [H, W, 3] images to (height, width) each.

    `two_pass` resizes the width first and rounds to 8 bits in between, as Pillow does.
    """
    if not images:
        return []
    dynamic = _dynamic(num_threads)
    batch = dynamic.as_batch([np.ascontiguousarray(image) for image in images], layout="HWC")
    resized = _resize(dynamic, batch, [image.shape[0] for image in images], targets, resample, two_pass)
    return [np.asarray(image) for image in resized.evaluate().tensors]


def _resize(
    dynamic: Any,
    batch: Any,
    heights: Sequence[int],
    targets: Sequence[tuple[int, int]],
    resample: str,
    two_pass: bool,
) -> Any:
    types: Any = importlib.import_module("nvidia.dali.types")
    interpolation = {"bicubic": types.INTERP_CUBIC, "bilinear": types.INTERP_LINEAR}[resample]
    steps = [list(targets)]
    if two_pass:
        steps.insert(0, [(height, width) for height, (_, width) in zip(heights, targets, strict=True)])
    for step in steps:
        sizes = dynamic.as_batch([np.array(size, dtype=np.float32) for size in step])
        batch = dynamic.resize(
            batch, size=sizes, interp_type=interpolation, antialias=True, dtype=dynamic.uint8
        )
    return batch


class OnGpu:
    """The same on a GPU: nvJPEG and DALI's resize on one CUDA stream; not safe in two threads at once."""

    def __init__(self, stream: torch.cuda.Stream, num_threads: int) -> None:
        self._dynamic = _dynamic(num_threads)
        self._context = self._dynamic.EvalContext(device_id=stream.device_index, cuda_stream=stream)

    def decode(self, encoded: Sequence[bytes]) -> list[Tensor | None]:
        """uint8 [H, W, 3] of each image on the GPU; None for one that DALI cannot or should not decode."""
        return _isolated(encoded, self._decode)

    def _decode(self, encoded: list[bytes]) -> list[Tensor]:
        buffers = _pinned(encoded)
        with self._context:
            # Chroma is interpolated as libjpeg-turbo does it, which the CPU backends read with.
            images = self._dynamic.decoders.image(
                self._dynamic.as_batch(buffers),
                device="gpu",
                adjust_orientation=False,
                jpeg_fancy_upsampling=True,
            )
            return [image.torch() for image in images.evaluate().tensors]

    def resize(
        self, images: Sequence[Tensor], targets: Sequence[tuple[int, int]], resample: str, two_pass: bool
    ) -> list[Tensor]:
        """As `resize`, of uint8 [H, W, 3] images on the GPU."""
        if not images:
            return []
        with self._context:
            batch = self._dynamic.as_batch([image.contiguous() for image in images], layout="HWC")
            heights = [image.shape[0] for image in images]
            resized = _resize(self._dynamic, batch, heights, targets, resample, two_pass)
            return [image.torch() for image in resized.evaluate().tensors]


def _pinned(encoded: Sequence[bytes]) -> list[np.ndarray]:
    """The images one behind the other in page-locked memory, which the GPU reads without a copy in between."""
    buffer = torch.empty(sum(map(len, encoded)), dtype=torch.uint8, pin_memory=True).numpy()
    ends = np.cumsum([len(data) for data in encoded])
    for data, end in zip(encoded, ends, strict=True):
        buffer[end - len(data) : end] = np.frombuffer(data, dtype=np.uint8)
    return np.split(buffer, ends[:-1])
