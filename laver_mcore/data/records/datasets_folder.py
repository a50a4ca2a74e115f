"""Folders of Hugging Face `datasets` (`save_to_disk`): Arrow files named in `state.json`, read without the library."""

import json
from pathlib import Path
from typing import Any

from laver_mcore.data.errors import DataError, reason

STATE, SPLITS = "state.json", "dataset_dict.json"


def is_datasets_folder(path: Path) -> bool:
    """Whether `save_to_disk` wrote this folder, as one set or as several splits."""
    return (path / STATE).is_file() or (path / SPLITS).is_file()


def arrow_files(path: Path) -> tuple[list[Path], str]:
    """The Arrow files of a folder in their order, of its `train` split where it has splits; and its fingerprint."""
    if (path / SPLITS).is_file():
        splits = _read(path / SPLITS).get("splits") or []
        if "train" not in splits:
            raise DataError(f"{path}: has no split 'train' but {splits}; give the folder of one of them")
        path = path / "train"
    state = _read(path / STATE)
    if state.get("_indices_files"):
        raise DataError(
            f"{path}: rows are chosen by a list of indices; save it again after flatten_indices()"
        )
    try:
        names = [entry["filename"] for entry in state["_data_files"]]
        files = [path / name for name in names if Path(name).name == name]
    except (KeyError, TypeError) as error:
        raise DataError(f"{path / STATE}: names no files ({reason(error)}); save the set again") from None
    missing = [file for file in files if not file.is_file()]
    if missing or len(files) != len(names) or not files:
        raise DataError(f"{path / STATE}: {(missing or names or ['nothing'])[0]} is no file of the folder")
    return files, str(state.get("_fingerprint"))


def _read(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{file}: cannot be read ({reason(error)}); save the set again") from None
    if not isinstance(content, dict):
        raise DataError(f"{file}: wanted a JSON mapping, got {type(content).__name__}")
    return content
