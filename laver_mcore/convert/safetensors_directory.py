"""Weights of a Hugging Face directory, read and written tensor by tensor.

Writing is by hand, for `safetensors.torch.save_file` wants a whole file's tensors in memory; the format is 8
bytes of header length, a JSON header, the numbers (https://huggingface.co/docs/safetensors/index#format).
"""

import json
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open

from laver_mcore.convert.errors import ConversionError

_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
_PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json")
_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
_READ = {code: dtype for dtype, code in _DTYPES.items()} | {"F64": torch.float64}
"""Numbers that mean what they say; integers and 8-bit floats are codes that need a scale."""
MAX_SHARD_BYTES = 4 * 2**30


def read_json(path: Path) -> dict[str, Any]:
    """A JSON mapping; `ConversionError` naming the file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        raise ConversionError(f"{path}: no such file; give a Hugging Face model directory") from None
    except ValueError as error:
        raise ConversionError(f"{path}: broken JSON ({error})") from None
    if not isinstance(content, dict):
        raise ConversionError(f"{path}: wanted a JSON mapping, got {type(content).__name__}")
    return content


class SafetensorsDirectory(Mapping[str, torch.Tensor]):
    """Tensors by name from all safetensors files of a directory, each read when it is asked for.

    Every file is opened once at construction, so a missing or truncated one is found before anything is
    converted.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._files: dict[str, Path] = {}
        for file in _list_files(self.path, *_WEIGHTS):
            for name in _names_in(file):
                if name in self._files:
                    raise ConversionError(f"{name} is in {self._files[name]} and in {file}; which is meant?")
                self._files[name] = file
        _check_index(self.path / _WEIGHTS[1], self._files)

    def __getitem__(self, name: str) -> torch.Tensor:
        # Opened anew each time: the mapped pages of a tensor are given back when the tensor is.
        with safe_open(self._files[name], framework="pt") as file:
            return _finite(name, file.get_tensor(name), self._files[name])

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Only the rows [start, stop) of a tensor."""
        with safe_open(self._files[name], framework="pt") as file:
            return _finite(name, file.get_slice(name)[start:stop], self._files[name])

    def describe(self, name: str) -> tuple[tuple[int, ...], torch.dtype]:
        """Shape and dtype from the header alone; `ConversionError` for a dtype that is not read."""
        with safe_open(self._files[name], framework="pt") as file:
            part = file.get_slice(name)
            code = part.get_dtype()
            if code not in _READ:
                raise ConversionError(
                    f"{self._files[name]}: {name} is {code}, codes without their scales; wanted {', '.join(_READ)}"
                )
            return tuple(part.get_shape()), _READ[code]

    def __contains__(self, name: object) -> bool:
        return name in self._files  # Mapping's own would read the tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


class PickledDirectory(Mapping[str, torch.Tensor]):
    """Tensors of `pytorch_model*.bin` files, mapped from disk and unpickled with `weights_only`."""

    def __init__(self, path: str | Path) -> None:
        self._path = Path(path)
        self._tensors: dict[str, torch.Tensor] = {}
        for file in _list_files(Path(path), *_PICKLED):
            try:
                self._tensors.update(torch.load(file, map_location="cpu", mmap=True, weights_only=True))
            except Exception as error:  # whatever a damaged or hostile pickle provokes
                raise ConversionError(f"{file}: not a readable weights file ({_reason(error)})") from None

    def __getitem__(self, name: str) -> torch.Tensor:
        return _finite(name, self._tensors[name], self._path)

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Only the rows [start, stop) of a tensor."""
        return _finite(name, self._tensors[name][start:stop], self._path)

    def describe(self, name: str) -> tuple[tuple[int, ...], torch.dtype]:
        """Shape and dtype; `ConversionError` for a dtype that is not read."""
        dtype = self._tensors[name].dtype
        if dtype not in _READ.values():
            raise ConversionError(f"{self._path}: {name} is {dtype}; wanted {', '.join(_READ)}")
        return tuple(self._tensors[name].shape), dtype

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


Weights = SafetensorsDirectory | PickledDirectory


def open_weights(path: str | Path, *, allow_pickle: bool = False) -> Weights:
    """Open a directory's weights; pickled ones only if the caller insists. Raises `ConversionError`."""
    path = Path(path)
    if any((path / name).is_file() for name in _WEIGHTS):
        return SafetensorsDirectory(path)
    if any((path / name).is_file() for name in _PICKLED):
        if not allow_pickle:
            raise ConversionError(
                f"{path} has pickled weights only; use a directory with safetensors, or --allow-pickle "
                "if you trust it"
            )
        return PickledDirectory(path)
    raise ConversionError(
        f"{path} has no {_WEIGHTS[0]} and no {_WEIGHTS[1]}; give a Hugging Face model directory"
    )


def _finite(name: str, tensor: torch.Tensor, where: Path) -> torch.Tensor:
    """The tensor, every number of which is one; `ConversionError` names it otherwise."""
    if tensor.is_floating_point() and not torch.isfinite(tensor).all():
        raise ConversionError(
            f"{where}: {name} holds NaN or infinity; download it again, or take another one"
        )
    return tensor


def _list_files(path: Path, single: str, index: str) -> list[Path]:
    if (path / single).is_file():
        return [path / single]
    weight_map = read_json(path / index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ConversionError(f"{path / index} has no weight_map; download the directory again")
    names = sorted({str(name) for name in weight_map.values()})
    for name in names:
        if Path(name).name != name:
            raise ConversionError(f"{path / index} names {name!r}, which is not a file of the directory")
        if not (path / name).is_file():
            raise ConversionError(
                f"{path / name} is missing, one of the {len(names)} files that {index} names"
            )
    return [path / name for name in names]


def _names_in(file: Path) -> list[str]:
    try:
        with safe_open(file, framework="pt") as opened:
            return list(opened.keys())
    except (SafetensorError, OSError) as error:
        raise ConversionError(
            f"{file}: truncated or not a safetensors file ({_reason(error)}); download it again"
        ) from None


def _check_index(index: Path, found: Mapping[str, Path]) -> None:
    if not index.is_file():
        return
    missing = sorted(set(read_json(index).get("weight_map") or {}) - set(found))
    if missing:
        raise ConversionError(
            f"{index} names {missing[0]}, which no file holds; download the directory again"
        )


def _reason(error: Exception) -> str:
    return (str(error) or type(error).__name__).strip().split("\n")[0][:200]


@dataclass(frozen=True, kw_only=True)
class TensorToWrite:
    """A tensor of the directory to be written; `blocks` yields its rows in order, all of them."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    blocks: Callable[[], Iterable[torch.Tensor]]

    @property
    def num_bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def write_safetensors(
    folder: Path, tensors: Sequence[TensorToWrite], max_shard_bytes: int = MAX_SHARD_BYTES
) -> None:
    """Write `tensors` into model.safetensors, or into several files with an index where they are too large
    for one.
    """
    shards: list[list[TensorToWrite]] = [[]]
    for tensor in tensors:
        if shards[-1] and sum(t.num_bytes for t in shards[-1]) + tensor.num_bytes > max_shard_bytes:
            shards.append([])
        shards[-1].append(tensor)
    if len(shards) == 1:
        write_file(folder / _WEIGHTS[0], shards[0])
        return
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_file(folder / name, shard)
        weight_map.update({tensor.name: name for tensor in shard})
    index = {"metadata": {"total_size": sum(t.num_bytes for t in tensors)}, "weight_map": weight_map}
    (folder / _WEIGHTS[1]).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def write_file(path: Path, tensors: Sequence[TensorToWrite]) -> None:
    """Write `tensors` into one safetensors file, block by block."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        start, end = end, end + tensor.num_bytes
        header[tensor.name] = {
            "dtype": _DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)  # numbers start at a multiple of 8
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        for tensor in tensors:
            _write_tensor(file, tensor)


def _write_tensor(file: BinaryIO, tensor: TensorToWrite) -> None:
    written = 0
    for block in tensor.blocks():
        numbers = block.to(tensor.dtype).contiguous().flatten().view(torch.uint8).numpy()
        written += file.write(numbers)  # type: ignore[call-overload]
    assert written == tensor.num_bytes, f"{tensor.name}: wrote {written} bytes of {tensor.num_bytes}"
