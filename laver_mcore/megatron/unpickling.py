"""Checkpoints are read without running anything that stands in them.

PyTorch's distributed checkpoints keep their table of contents as a pickle, and objects beside tensors as pickles of
`torch.save`; a pickle may name any function to be called when it is read. Inside `nothing_runs()` only what describes
tensors can be named, and `torch.load` reads tensors and plain values alone; `reading` says besides what is damaged.
"""

import contextlib
import pickle
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from megatron.core.dist_checkpointing.core import CheckpointingException
from torch.distributed.checkpoint import filesystem
from torch.distributed.checkpoint.api import CheckpointException

from laver_mcore.megatron.checkpoints import CheckpointError, reason_of

_CONTENTS = "torch.distributed.checkpoint"
_ALLOWED = {
    "collections": {"OrderedDict"},
    "pathlib": {"Path", "PosixPath", "PurePosixPath"},
    "torch": {"Size"},
    "torch.serialization": {"_get_layout"},
    f"{_CONTENTS}.filesystem": {"_StorageInfo", "_StoragePrefix"},
    f"{_CONTENTS}.planner": {"SavePlan", "TensorWriteData", "WriteItem", "WriteItemType"},
    f"{_CONTENTS}.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
}


_DAMAGED = (
    OSError, EOFError, RuntimeError, ValueError, LookupError, TypeError, AttributeError, AssertionError, MemoryError,
    pickle.UnpicklingError, CheckpointException, CheckpointingException,
)  # fmt: skip
"""What PyTorch and Megatron-Core raise on damaged files, depending on where the damage is."""


class UntrustedError(CheckpointError):
    """A file wants more than tensors and plain values to be loaded."""


class _Contents(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name in _ALLOWED.get(module, ()):
            return super().find_class(module, name)
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        raise UntrustedError(f"names {module}.{name}, which no checkpoint needs: nothing of it is loaded")


@contextlib.contextmanager
def nothing_runs() -> Iterator[None]:
    """Context in which PyTorch and Megatron-Core read checkpoints; `UntrustedError` for one that wants to run code."""
    load = torch.load

    def load_values(*args: Any, **kwargs: Any) -> Any:
        try:
            return load(*args, **kwargs | {"weights_only": True})
        except pickle.UnpicklingError as error:
            wanted = str(error).split("GLOBAL ")
            name = f"names {wanted[1].split()[0]}" if len(wanted) > 1 else "is no plain pickle"
            raise UntrustedError(
                f"an object {name}, which no checkpoint needs: nothing of it is loaded"
            ) from None

    modules: Any = filesystem
    pickled = modules.pickle
    torch.load = load_values
    modules.pickle = SimpleNamespace(**vars(pickled) | {"load": lambda file: _Contents(file).load()})
    try:
        yield
    finally:
        torch.load, modules.pickle = load, pickled


@contextlib.contextmanager
def reading(folder: Path) -> Iterator[None]:
    """`nothing_runs` for the checkpoint in `folder`; whatever is wrong with it is one line, `CheckpointError`."""
    try:
        with nothing_runs():
            yield
    except CheckpointError as error:
        raise CheckpointError(f"{folder}: {error}") from None
    except _DAMAGED as error:
        raise CheckpointError(f"{folder}: cannot be read ({reason_of(error)}); load another") from None
