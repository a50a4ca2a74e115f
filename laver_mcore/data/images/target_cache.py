"""Features of a frozen encoder, computed once and read back by the hash of an image's file.

    cache.json                            what made them: encoder, pixels, grid [rows, columns], width
    features-<part>-<number>.safetensors  keys uint64 [i, 2], features bfloat16 [i, rows * columns, width]

A file is complete once it has its name, so that whoever makes a cache can be stopped and started again.
"""

import functools
import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from laver_mcore.data.errors import DataError
from laver_mcore.data.images.decode import DecodedImages
from laver_mcore.data.images.source import read_image_bytes
from laver_mcore.data.images.wanted import PixelMaker, WantedImage

_ABOUT = "cache.json"
Key = tuple[int, int]


def image_key(encoded: bytes) -> Key:
    """128 bits of the hash of an image's file."""
    first, second = np.frombuffer(hashlib.blake2b(encoded, digest_size=16).digest(), dtype=np.uint64)
    return int(first), int(second)


class TargetCache:
    """Reads features: int16 [I, n, Z], the bits of bfloat16, which NumPy and pipes between processes do not have."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.about = read_about(self.folder)
        self.grid: tuple[int, int] = tuple(self.about["grid"])
        self.width: int = self.about["width"]

    def check(self, **wanted: Any) -> None:
        """DataError where the cache was made of something else."""
        for name, value in wanted.items():
            if self.about.get(name) != value:
                raise DataError(f"{self.folder}: holds {name}={self.about.get(name)!r}, wanted {value!r}")

    def maker(self, images: DecodedImages) -> PixelMaker:
        return self

    def fingerprint(self) -> str:
        return f"TargetCache({json.dumps(self.about, sort_keys=True)})"

    def __call__(self, images: Sequence[WantedImage]) -> tuple[Tensor, dict[int, str]]:
        """Zeros for an image that cannot be read or is not in the cache, and why."""
        features_InZ = torch.zeros(len(images), self.grid[0] * self.grid[1], self.width, dtype=torch.bfloat16)
        failures: dict[int, str] = {}
        for position, image in enumerate(images):
            try:
                found = self._find(image_key(read_image_bytes(image.source)))
                if found is None:
                    raise DataError(f"{image.source}: not in {self.folder}; run laver prepare-targets again")
                features_InZ[position] = found
            except DataError as error:
                failures[position] = str(error)
        return features_InZ.view(torch.int16), failures

    def _find(self, key: Key) -> Tensor | None:
        first_K, second_K, file_K, row_K = self._index
        place = int(np.searchsorted(first_K, np.uint64(key[0])))
        if place == len(first_K) or (int(first_K[place]), int(second_K[place])) != key:
            return None
        file = self._files[file_K[place]]
        try:
            return _open(file).get_slice("features")[int(row_K[place]) : int(row_K[place]) + 1][0]
        except (OSError, SafetensorError) as error:
            raise DataError(f"{file}: cannot be read ({error}); delete it and make it again") from None

    @functools.cached_property
    def _files(self) -> list[Path]:
        return _feature_files(self.folder)

    @functools.cached_property
    def _index(self) -> tuple[np.ndarray, ...]:
        """Keys in order, with file and row of each; read where it is first needed, not sent to workers."""
        keys = [_keys(file) for file in self._files]
        keys_K2 = np.concatenate([np.empty((0, 2), dtype=np.uint64), *keys])
        files_K = np.repeat(np.arange(len(keys)), [len(k) for k in keys])
        rows_K = np.concatenate([np.empty(0, dtype=np.int64), *(np.arange(len(k)) for k in keys)])
        order_K = np.argsort(keys_K2[:, 0], kind="stable")
        return keys_K2[order_K, 0], keys_K2[order_K, 1], files_K[order_K], rows_K[order_K]

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("_files", "_index")}


class TargetCacheWriter:
    """Adds features of one part of a data set to a cache, a file at a time."""

    def __init__(
        self, folder: str | Path, about: dict[str, Any], *, part: int = 0, images_per_file: int = 512
    ) -> None:
        self._folder, self._part, self._most = Path(folder), part, images_per_file
        self._folder.mkdir(parents=True, exist_ok=True)
        if (self._folder / _ABOUT).exists():
            TargetCache(self._folder).check(**about)
        else:
            _publish(self._folder / _ABOUT, lambda path: path.write_text(json.dumps(about, indent=1) + "\n"))
        files = _feature_files(self._folder)
        self.present: set[Key] = {(int(a), int(b)) for file in files for a, b in _keys(file)}
        self._next = 1 + max(
            (int(f.stem.split("-")[2]) for f in files if f.name.startswith(self._prefix)), default=-1
        )
        self._keys: list[Key] = []
        self._features: list[Tensor] = []

    @property
    def _prefix(self) -> str:
        return f"features-{self._part:03d}-"

    def add(self, key: Key, features_nZ: Tensor) -> None:
        """Keep one image's features; written when a file is full."""
        self.present.add(key)
        self._keys.append(key)
        self._features.append(features_nZ.to("cpu", torch.bfloat16))
        if len(self._keys) == self._most:
            self.close()

    def close(self) -> None:
        """Write what has been added."""
        if not self._keys:
            return
        tensors = {
            "keys": torch.from_numpy(np.array(self._keys, dtype=np.uint64).view(np.int64)),
            "features": torch.stack(self._features),
        }
        name = f"{self._prefix}{self._next:06d}.safetensors"
        _publish(self._folder / name, lambda path: save_file(tensors, path))
        self._next += 1
        self._keys, self._features = [], []


def read_about(folder: Path) -> dict[str, Any]:
    """What made a cache; DataError for a folder that is none."""
    try:
        about = json.loads((folder / _ABOUT).read_text(encoding="utf-8"))
        rows, columns = about["grid"]
        if not (int(rows) > 0 and int(columns) > 0 and int(about["width"]) > 0):
            raise ValueError("grid and width must be positive")
    except OSError:
        raise DataError(f"{folder}: no {_ABOUT} there; make a cache with laver prepare-targets") from None
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{folder / _ABOUT}: broken ({error}); make the cache again") from None
    return about


def _feature_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("features-*-*.safetensors"))


def _keys(file: Path) -> np.ndarray:
    try:
        return _open(file).get_tensor("keys").numpy().view(np.uint64)
    except (OSError, SafetensorError) as error:
        raise DataError(f"{file}: cannot be read ({error}); delete it and make it again") from None


@functools.lru_cache(maxsize=256)
def _open(file: Path) -> Any:
    return safe_open(file, framework="pt")


def _publish(file: Path, write: Callable[[Path], Any]) -> None:
    """Written aside under a name of this process, and renamed."""
    aside = file.with_name(f".{file.name}.{os.getpid()}")
    write(aside)
    os.replace(aside, file)
