"""Distributed checkpoints (Megatron's torch_dist) read and written block by block, in one process, without
Megatron's process groups: no more than one block of a tensor is in memory at a time.

    DIR/latest_checkpointed_iteration.txt    written last
    DIR/iter_0000000/.metadata, *.distcp     tensors by key and offset (PyTorch's distributed checkpoint)
    DIR/iter_0000000/common.pt, metadata.json
"""

import io
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    ReadItem,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from laver_mcore.convert.errors import ConversionError
from laver_mcore.megatron.intact import seal
from laver_mcore.megatron.unpickling import reading

BLOCK_BYTES = 256 * 2**20
"""Vocabulary tensors are cut into blocks of rows of at most this size."""


@dataclass(frozen=True, kw_only=True)
class Block:
    """A part of the tensor `key` of `global_shape`: `sizes` numbers from `offsets` on, fetched when it is
    written.
    """

    key: str
    global_shape: tuple[int, ...]
    dtype: torch.dtype
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    fetch: Callable[[], torch.Tensor]


def row_blocks(shape: tuple[int, ...], dtype: torch.dtype, limit: int = BLOCK_BYTES) -> list[tuple[int, int]]:
    """Cut the rows of a tensor into ranges (start, stop) of at most `limit` bytes each (at least one row)."""
    row_bytes = max(1, torch.Size(shape[1:]).numel() * dtype.itemsize)
    step = max(1, limit // row_bytes)
    return [(start, min(start + step, shape[0])) for start in range(0, shape[0], step)]


class _BlockPlanner(DefaultSavePlanner):
    """Plans the blocks as shards, and fetches each one when the writer comes to it."""

    def __init__(self, blocks: Iterable[Block], objects: dict[str, bytes]) -> None:
        super().__init__(flatten_state_dict=False)
        self._objects = objects
        self._blocks = {MetadataIndex(b.key, torch.Size(b.offsets)): b for b in blocks}
        self._last: torch.Tensor | None = None

    def create_local_plan(self) -> SavePlan:
        items = [WriteItem(index=MetadataIndex(name), type=WriteItemType.BYTE_IO) for name in self._objects]
        for index, block in self._blocks.items():
            data = TensorWriteData(
                chunk=ChunkStorageMetadata(offsets=torch.Size(block.offsets), sizes=torch.Size(block.sizes)),
                properties=TensorProperties(dtype=block.dtype),
                size=torch.Size(block.global_shape),
            )
            items.append(WriteItem(index=index, type=WriteItemType.SHARD, tensor_data=data))
        self.plan = SavePlan(items=items)
        return self.plan

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor | io.BytesIO:
        if write_item.type == WriteItemType.BYTE_IO:
            return io.BytesIO(self._objects[write_item.index.fqn])
        if self._last is not None:
            # PyTorch's writer keeps a reference to every tensor until the file is closed.
            self._last.untyped_storage().resize_(0)
        block = self._blocks[MetadataIndex(write_item.index.fqn, write_item.index.offset)]
        fetched = block.fetch().to(block.dtype).reshape(block.sizes)
        # A copy of our own, for what was fetched may be a view of a mapped file.
        self._last = torch.empty(block.sizes, dtype=block.dtype).copy_(fetched)
        return self._last


def write_checkpoint(
    folder: Path, blocks: Iterable[Block], objects: dict[str, bytes], common: dict[str, Any]
) -> None:
    """Write one checkpoint folder; `objects` are serialised byte entries, `common` what every rank reads.

    What a block's `fetch` raises comes out as it is.
    """
    folder.mkdir(parents=True)
    writer = dcp.FileSystemWriter(folder, thread_count=1, sync_files=False)
    try:
        dcp.save({}, storage_writer=writer, planner=_BlockPlanner(blocks, objects), no_dist=True)
    except CheckpointException as error:  # wraps whatever a block raised, and is no Exception itself
        raise next(iter(error.failures.values()))[0] from None
    torch.save(common, folder / "common.pt")
    save_config(CheckpointingConfig("torch_dist"), str(folder))
    seal(folder)


class _RegionPlanner(DefaultLoadPlanner):
    """Reads one region of one tensor into `target`."""

    def __init__(self, target: torch.Tensor) -> None:
        super().__init__()
        self._target = target

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        region = self._target
        for dim, (start, length) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
            region = region.narrow(dim, start, length)
        return region

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None: ...


class CheckpointReader:
    """Random access to the tensors of one checkpoint folder; `CheckpointError` if it is none or damaged."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._reader = dcp.FileSystemReader(self.folder)
        with reading(self.folder):
            self._metadata = self._reader.read_metadata()
            self.common: dict[str, Any] = torch.load(self.folder / "common.pt")
        self._reader.set_up_storage_reader(self._metadata, is_coordinator=True)
        entries = self._metadata.state_dict_metadata
        self._tensors = {k: v for k, v in entries.items() if isinstance(v, TensorStorageMetadata)}

    def __iter__(self) -> Iterator[str]:
        """Keys of all tensors."""
        return iter(self._tensors)

    def __contains__(self, key: str) -> bool:
        return key in self._tensors

    def shape(self, key: str) -> tuple[int, ...]:
        """Whole shape of a tensor, the stacked layers of a decoder weight included."""
        return tuple(self._entry(key).size)

    def dtype(self, key: str) -> torch.dtype:
        """Stored dtype of a tensor."""
        return self._entry(key).properties.dtype

    def read(self, key: str, layer: int | None = None, rows: tuple[int, int] | None = None) -> torch.Tensor:
        """A tensor, one `layer` of a stacked one, or of either only the `rows` (start, stop)."""
        entry = self._entry(key)
        offsets, sizes = [0] * len(entry.size), list(entry.size)
        first = 0
        if layer is not None:
            offsets[0], sizes[0], first = layer, 1, 1
        if rows is not None:
            offsets[first], sizes[first] = rows[0], rows[1] - rows[0]
        target = torch.empty(sizes, dtype=entry.properties.dtype)
        wanted = ChunkStorageMetadata(offsets=torch.Size(offsets), sizes=torch.Size(sizes))
        items = create_read_items_for_chunk_list(key, entry, [wanted])
        with reading(self.folder):
            self._reader.read_data(LoadPlan(items), _RegionPlanner(target)).wait()
        return target if layer is None else target[0]

    def _entry(self, key: str) -> TensorStorageMetadata:
        if key not in self._tensors:
            raise ConversionError(f"{self.folder} has no {key}; it is of another model")
        return self._tensors[key]
