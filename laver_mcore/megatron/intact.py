"""Which checkpoints are whole: every file's checksum, and the newest one that can be trusted to be what was saved.

DIR/latest_checkpointed_iteration.txt    what to load; where it is missing or damaged, the newest whole one
DIR/iter_0000100/checksums.json          size and BLAKE2b of every file, written before the folder gets its name
"""

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch.distributed as dist

from laver_mcore.megatron.checkpoints import TRACKER, CheckpointError, checkpoint_folder

CHECKSUMS = "checksums.json"
_NEEDED = ("metadata.json", "common.pt", ".metadata")


def files_of(folder: Path) -> list[str]:
    """Names of the files of a checkpoint, in order, without the list of checksums."""
    return sorted(p.name for p in folder.iterdir() if p.is_file() and p.name != CHECKSUMS)


def checksum(file: Path) -> dict[str, Any]:
    """Size in bytes and BLAKE2b of a file."""
    with file.open("rb") as opened:
        digest = hashlib.file_digest(opened, lambda: hashlib.blake2b(digest_size=16))
    return {"bytes": file.stat().st_size, "blake2b": digest.hexdigest()}


def seal(folder: Path, known: dict[str, Any] | None = None) -> None:
    """Write the checksums of a finished folder; all ranks take part.

    `known` are those of the files that this rank wrote, on the disk already; rank 0 looks at what is left.
    """
    whole = {name: found for part in _gather(known or {}) for name, found in part.items()}
    if _rank() != 0:
        return
    for name in files_of(folder):
        if name not in whole:
            whole[name] = checksum(folder / name)
            _on_disk(folder / name)
    text = json.dumps({"files": dict(sorted(whole.items()))}, indent=1)
    (folder / CHECKSUMS).write_text(text + "\n", encoding="utf-8")
    _on_disk(folder / CHECKSUMS)
    _on_disk(folder)


def _on_disk(path: Path) -> None:
    """Wait until a file or folder would survive a power cut."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def first_fault(folder: Path, *, verify: bool = True) -> str | None:
    """What is wrong with a checkpoint, `FILE: why`, or None; the same answer on all ranks, which share the work.

    One without checksums was made by an older version: its files are only looked for.
    """
    fault = None
    try:
        wanted = _wanted(folder)
        for name in _mine(wanted or _NEEDED):
            fault = fault or _fault(folder / name, (wanted or {}).get(name), verify)
    except CheckpointError as error:
        fault = str(error)
    return next((found for found in _gather(fault) if found), None)


def looks_whole(folder: Path) -> bool:
    """Whether all files are there with their sizes, as this process sees it; no checksum is computed."""
    try:
        wanted = _wanted(folder)
    except CheckpointError:
        return False
    return all(_fault(folder / name, (wanted or {}).get(name), False) is None for name in wanted or _NEEDED)


def _wanted(folder: Path) -> dict[str, Any] | None:
    file = folder / CHECKSUMS
    if not file.exists():
        return None
    try:
        files = json.loads(file.read_text(encoding="utf-8"))["files"]
        if not set(_NEEDED) <= set(files) or not all(
            isinstance(found["bytes"], int) for found in files.values()
        ):
            raise ValueError("it does not name what a checkpoint has")
        return dict(files)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{CHECKSUMS}: cannot be read ({error})") from None


def _fault(file: Path, wanted: dict[str, Any] | None, verify: bool) -> str | None:
    try:
        size = file.stat().st_size
        if not file.is_file():
            return f"{file.name}: is no file"
        if wanted is None:
            return None if size else f"{file.name}: is empty"
        if size != wanted["bytes"]:
            return f"{file.name}: has {size:,} bytes, was saved with {wanted['bytes']:,}"
        if verify and checksum(file) != wanted:
            return f"{file.name}: is not what was saved (its checksum differs)"
    except OSError as error:
        return f"{file.name}: {error.strerror or error}"
    return None


def saved_iterations(directory: str | Path) -> list[int]:
    """Iterations of all folders of checkpoints, the newest first."""
    names = (path.name.removeprefix("iter_") for path in Path(directory).glob("iter_*") if path.is_dir())
    return sorted((int(name) for name in names if name.isdecimal()), reverse=True)


def tracked_iteration(directory: str | Path) -> int | None:
    """What the tracker file names; None where it is missing or holds no number."""
    try:
        text = (Path(directory) / TRACKER).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return None
    return int(text) if text.isascii() and text.isdecimal() else None


def candidates(directory: str | Path) -> list[int]:
    """Iterations to try: the tracked one and what is older, or, without a tracker, all of them, newest first.

    Without a tracker a folder from before there were checksums may be one that was never finished.
    """
    tracked, saved = tracked_iteration(directory), saved_iterations(directory)
    if tracked is None:
        return [i for i in saved if (checkpoint_folder(directory, i) / CHECKSUMS).exists()] or saved
    return [tracked, *(i for i in saved if i < tracked), *(i for i in saved if i > tracked)]


def newest_intact(directory: str | Path, *, verify: bool = True) -> tuple[Path, list[str]]:
    """The checkpoint to load, and a line for each that was passed over; all ranks take part and get the same.

    `CheckpointError` where there is none.
    """
    passed: list[str] = []
    tried = candidates(directory)
    for iteration in tried:
        folder = checkpoint_folder(directory, iteration)
        fault = first_fault(folder, verify=verify) if folder.is_dir() else "is missing"
        if fault is None:
            if tracked_iteration(directory) is None:
                passed.append(f"{Path(directory) / TRACKER} is missing or damaged")
            return folder, [f"{line}; going on from {folder.name}" for line in passed]
        passed.append(
            f"{folder.name} is damaged ({fault})" if fault != "is missing" else f"{folder.name} is missing"
        )
    if not tried:
        raise CheckpointError(f"{directory} holds no checkpoint ({TRACKER} is missing)")
    raise CheckpointError(f"{directory} holds no checkpoint that is whole: {'; '.join(passed)}")


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _mine(names: Iterable[str]) -> list[str]:
    """Every so manieth name, so that ranks share them out."""
    return list(names)[_rank() :: dist.get_world_size() if dist.is_initialized() else 1]


def _gather(own: Any) -> list[Any]:
    if not dist.is_initialized():
        return [own]
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, own)
    return gathered
