"""A checkpoint is written aside and published by one rename; one that cannot be written is one line, on all ranks."""

import contextlib
import errno
import math
import queue
import shutil
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.mapping import ShardedTensor, is_main_replica
from megatron.core.dist_checkpointing.serialization import get_default_save_sharded_strategy
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper
from torch.distributed.checkpoint.api import CheckpointException

from laver_mcore.megatron.background import Copied
from laver_mcore.megatron.checkpoints import TRACKER, SaveError, checkpoint_folder, reason_of
from laver_mcore.megatron.intact import checksum, looks_whole, saved_iterations, seal
from laver_mcore.megatron.versions import own_writer, with_common_file

_SPARE = 1.05
"""Space that is wanted beyond the tensors' own bytes, for what describes them."""

_FILES = 2
"""That a rank writes at a time; what Megatron-Core does by itself differs between versions."""


def check_finite(chunks: Sequence[torch.nn.Module]) -> None:
    """`SaveError` on all ranks where a weight is not finite: such a checkpoint is worth less than the one before."""
    named = {name: parameter for chunk in chunks for name, parameter in chunk.named_parameters()}
    # One look at each number, no copy of any.
    largest = torch._foreach_norm(list(named.values()), float("inf"))
    names = [name for name, norm in zip(named, largest, strict=True) if not math.isfinite(norm)]
    gathered: list[list[str]] = [[]] * dist.get_world_size()
    dist.all_gather_object(gathered, names)
    found = [name for part in gathered for name in part]
    if found:
        raise SaveError(f"not saved: {found[0]} and {len(found) - 1} other weights are not finite")


def check_space(state: dict[str, Any], aside: Path) -> None:
    """`SaveError` on all ranks where the disk that holds `aside` has no room for the tensors of `state`."""
    mine = sum(
        tensor.data.numel() * tensor.data.element_size()
        for tensor in _tensors(state)
        if tensor.data is not None and is_main_replica(tensor.replica_id)
    )
    needed = torch.tensor([mine], dtype=torch.int64, device=torch.cuda.current_device())
    dist.all_reduce(needed)
    with writing(aside):
        free, wanted = shutil.disk_usage(aside).free, int(int(needed) * _SPARE)
        if free < wanted:
            raise OSError(errno.ENOSPC, f"{free / 2**30:.2f} GiB free, {wanted / 2**30:.2f} needed")


def _tensors(tree: Any) -> Iterator[ShardedTensor]:
    if isinstance(tree, ShardedTensor):
        yield tree
    elif isinstance(tree, dict):
        for value in tree.values():
            yield from _tensors(value)
    elif isinstance(tree, list | tuple):
        for value in tree:
            yield from _tensors(value)


@contextlib.contextmanager
def writing(aside: Path) -> Iterator[None]:
    """Context of a part of a save, which ends with all ranks knowing whether any of them failed: `SaveError` on all.

    What has been written of `aside` is deleted then.
    """
    fault = None
    try:
        yield
    except (OSError, RuntimeError, CheckpointException, CheckpointingException) as error:
        fault = reason_of(error)
    faults: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(faults, fault)
    found = next((each for each in faults if each), None)
    if found is not None:
        if dist.get_rank() == 0 and aside.name.endswith(".saving"):
            shutil.rmtree(aside, ignore_errors=True)
        raise SaveError(
            f"{aside.with_suffix('') if aside.suffix == '.saving' else aside}: not saved ({found})"
        )


class Write:
    """A checkpoint on its way: a copy of each rank's process writes what stood there when it began.

    The ranks of `replicas`, which have the same weights, write a share of them each. All ranks take part in everything;
    `SaveError` on all where any of them fails.
    """

    def __init__(
        self,
        state: dict[str, Any],
        content: dict[str, Any],
        aside: Path,
        folder: Path,
        replicas: dist.ProcessGroup,
    ) -> None:
        self._aside, self._folder = aside, folder
        # Megatron-Core's own is kept by a process of its own; each save has another, so that two may be on their way.
        self._results: queue.SimpleQueue[Any] = queue.SimpleQueue()
        filesystem_async._results_queue = self._results
        strategy = get_default_save_sharded_strategy()
        strategy.thread_count = _FILES
        with writing(aside):
            request = dist_checkpointing.save(
                state,
                str(aside),
                FullyParallelSaveStrategyWrapper(strategy, replicas),
                content_metadata=content,
                async_sharded_save=True,
                preprocess_common_before_consistancy_check=_without_empty,
                **own_writer(dist_checkpointing.save),
            )
            self._finalize, self._copied = request.finalize_fns, None
            if request.async_fn is not None:
                buckets = request.preload_fn()
                self._copied = Copied(partial(_write_files, request.async_fn, buckets))

    def is_written(self, group: dist.ProcessGroup) -> bool:
        """Whether all ranks have written their part; `group` is one of all ranks, on CPUs."""
        done = self._copied is None or self._copied.is_done()
        flag = torch.tensor([int(done)], dtype=torch.int32, device="cpu")
        dist.all_reduce(flag, op=dist.ReduceOp.MIN, group=group)
        return bool(flag.item())

    def finish(self) -> Path:
        """Wait until all is written, seal and publish it; returns its folder."""
        checksums: dict[str, Any] = {}
        with writing(self._aside):
            if self._copied is not None:
                results, checksums = self._copied.result()
                self._results.put(results)
        with writing(self._aside):
            for finalize in self._finalize:
                finalize()
            if dist.get_rank() == 0:
                with_common_file(self._aside)
        with writing(self._aside):
            seal(self._aside, checksums)
        with writing(self._aside):
            publish(self._aside, self._folder)
        return self._folder


def _without_empty(common: dict[str, Any]) -> dict[str, Any]:
    """What ranks must agree on: not on whether nothing is left of what they had to write."""
    pairs = ((k, _without_empty(v) if isinstance(v, dict) else v) for k, v in common.items())
    return {key: value for key, value in pairs if value != {}}


def _write_files(write: Callable[..., None], buckets: Any) -> tuple[Any, dict[str, Any]]:
    """Write this rank's files; what Megatron-Core wants to know of them (or its error), and their checksums."""
    found: queue.SimpleQueue[Any] = queue.SimpleQueue()
    write(dist.get_rank(), buckets, found)
    results = found.get_nowait()
    written = [] if isinstance(results, Exception) else [Path(bucket[0]) for bucket in buckets]
    return results, {file.name: checksum(file) for file in written}


def publish(aside: Path, folder: Path) -> None:
    """Give a finished checkpoint its name, and point the tracker at it; rank 0 does."""
    if dist.get_rank() != 0:
        return
    before = folder.with_name(f"{folder.name}.replaced")  # the same iteration, saved before
    shutil.rmtree(before, ignore_errors=True)
    if folder.exists():
        folder.replace(before)
    aside.replace(folder)
    shutil.rmtree(before, ignore_errors=True)
    tracker = folder.parent / TRACKER
    partial = tracker.with_suffix(".tmp")
    partial.write_text(str(int(folder.name.removeprefix("iter_"))), encoding="utf-8")
    partial.replace(tracker)


def prune(directory: str | Path, newest: int, *, keep_last: int | None, keep_every: int | None) -> None:
    """Delete old checkpoints: all but the `keep_last` newest and those divisible by `keep_every`; rank 0 does.

    `newest` is the one that was just saved. What a fall-back has left behind, damaged or of later iterations, neither
    counts nor is deleted.
    """
    if keep_last is None or dist.get_rank() != 0:
        return
    older = [i for i in saved_iterations(directory) if i <= newest]
    for iteration in [i for i in older if looks_whole(checkpoint_folder(directory, i))][keep_last:]:
        if keep_every is None or iteration % keep_every:
            folder = checkpoint_folder(directory, iteration)
            doomed = folder.with_name(f"{folder.name}.deleted")  # never half a checkpoint under its own name
            with contextlib.suppress(OSError):
                folder.replace(doomed)
                shutil.rmtree(doomed, ignore_errors=True)
