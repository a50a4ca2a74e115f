"""NVIDIA DALI's dynamic mode on CPU: batch decode and batch resize. The only file that imports DALI.

Measured on DALI 2.4.0: JPEG and PNG decode to Pillow's very bits; one damaged image fails its whole batch;
grey PNGs of 16 bits come out otherwise than anywhere else, and GIF and AVIF not at all, so Pillow decodes
those.
"""

import importlib
import importlib.util
import struct
import threading
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np

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


def decodes(encoded: bytes) -> bool:
    """Whether DALI gives the reference's pixels: a JPEG, or an opaque PNG of 8 bits."""
    if encoded[:3] == b"\xff\xd8\xff":
        return True
    if encoded[:8] != _PNG or len(encoded) < 33:
        return False
    bits, colour = encoded[24], encoded[25]
    return bits <= 8 and colour in (0, 2, 3) and not _has_transparency(encoded)


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
    decoded: list[np.ndarray | None] = [None] * len(encoded)
    if not installed():
        return decoded
    ours = [position for position, data in enumerate(encoded) if decodes(data)]
    if not ours:
        return decoded
    try:
        arrays = _decode_batch([encoded[position] for position in ours], num_threads)
        for position, array in zip(ours, arrays, strict=True):
            decoded[position] = array
    except RuntimeError:
        for position in ours:
            try:
                decoded[position] = _decode_batch([encoded[position]], num_threads)[0]
            except RuntimeError:
                continue  # Pillow has the last word, and the better message
    return decoded


def _decode_batch(encoded: list[bytes], num_threads: int) -> list[np.ndarray]:
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
    types: Any = importlib.import_module("nvidia.dali.types")

    dynamic = _dynamic(num_threads)
    interpolation = {"bicubic": types.INTERP_CUBIC, "bilinear": types.INTERP_LINEAR}[resample]
    batch = dynamic.as_batch([np.ascontiguousarray(image) for image in images], layout="HWC")
    steps = [list(targets)]
    if two_pass:
        steps.insert(0, [(image.shape[0], width) for image, (_, width) in zip(images, targets, strict=True)])
    for step in steps:
        sizes = dynamic.as_batch([np.array(size, dtype=np.float32) for size in step])
        batch = dynamic.resize(
            batch, size=sizes, interp_type=interpolation, antialias=True, dtype=dynamic.uint8
        )
    return [np.asarray(image) for image in batch.evaluate().tensors]
