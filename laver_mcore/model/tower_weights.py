"""Every tensor of a vision tower's directory, accounted for before one is read: the tower's own, another part's, or a
reason to refuse it all.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from safetensors import SafetensorError, safe_open

from laver_mcore.config.errors import ConfigError

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_FLOATS = ("F32", "BF16", "F16", "F64")
"""Numbers that mean what they say; integers and 8-bit floats are codes that need a scale."""
_COMPUTED = ("position_ids", "rotary_pos_emb.inv_freq")
"""Ends of names of tensors that the config says again."""
_RENAMED = (
    ("attention.attention.query.", "attention.q_proj."),
    ("attention.attention.key.", "attention.k_proj."),
    ("attention.attention.value.", "attention.v_proj."),
    ("attention.output.dense.", "attention.o_proj."),
)
"""DINOv2's names as published, and as transformers 5 has them in memory."""
_LONGEST_REASON = 200

Result = TypeVar("Result")


class StoredTensor(NamedTuple):
    """One tensor's header; `dtype` is safetensors' code."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: str


def stored_tensors(path: Path) -> list[StoredTensor]:
    """Headers of all weights of a Hugging Face directory; ConfigError for a file that is missing or broken, and for a
    name that two files hold.
    """
    found: dict[str, StoredTensor] = {}
    for file in _files(path):
        try:
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118 (not a mapping)
                    if name in found:
                        raise ConfigError(f"{name} is in {found[name].file} and in {file}; which is meant?")
                    part = opened.get_slice(name)
                    found[name] = StoredTensor(file, name, tuple(part.get_shape()), part.get_dtype())
        except (SafetensorError, OSError) as error:
            raise ConfigError(
                f"{file}: truncated or not a safetensors file ({first_line(error)}); download it again"
            ) from None
    return list(found.values())


def account(
    path: Path,
    stored: Iterable[StoredTensor],
    expected: Mapping[str, tuple[int, ...]],
    *,
    prefixes: tuple[str, ...],
    other_parts: tuple[str, ...],
) -> dict[str, StoredTensor]:
    """Which stored tensor is which of the tower's `expected` ones, name -> shape.

    `prefixes` may stand before the tower's names, in this order; names that begin with one of `other_parts` belong to
    the rest of a whole checkpoint. ConfigError names file and tensor where one is missing, unknown, of another shape,
    of no float dtype, or there twice.
    """
    names = {_today(name): name for name in expected}
    used: dict[str, StoredTensor] = {}
    for tensor in stored:
        own = tensor.name
        for prefix in prefixes:
            own = own.removeprefix(prefix)
        own = names.get(_today(own), own)
        where = f"{tensor.file}: {tensor.name}"
        if own not in expected:
            if not tensor.name.startswith(other_parts) and not own.endswith(_COMPUTED):
                raise ConfigError(
                    f"{where} has no place in the vision tower that config.json describes; has it more layers, or is "
                    "it another architecture?"
                )
            continue
        if own in used:
            raise ConfigError(f"{where} and {used[own].name} are the same weights; which is meant?")
        if tensor.dtype not in _FLOATS:
            raise ConfigError(
                f"{where} is {tensor.dtype}, codes without their scales; wanted {', '.join(_FLOATS)}"
            )
        if tensor.shape != expected[own]:
            raise ConfigError(
                f"{where} is {list(tensor.shape)}, its config.json asks for {list(expected[own])}"
            )
        used[own] = tensor
    missing = sorted(set(expected) - set(used))
    if missing:
        raise ConfigError(
            f"{path}: {len(missing)} weights of the vision tower are missing, {missing[0]!r} among them; "
            "use a checkpoint that holds the tower, or vision_random_init"
        )
    return used


def _today(name: str) -> str:
    for published, now in _RENAMED:
        name = name.replace(published, now)
    return name


def refuse_non_finite(parameters: Mapping[str, torch.Tensor], used: Mapping[str, StoredTensor]) -> None:
    """ConfigError naming the first of the tower's weights that holds NaN or infinity."""
    for name, parameter in parameters.items():
        if not torch.isfinite(parameter).all():
            raise ConfigError(
                f"{used[name].file}: {used[name].name} holds NaN or infinity; download it again, or take another one"
            )


def from_config(make: Callable[..., Result], config: Any, where: str | Path | None) -> Result:
    """`make(config)` of transformers; ConfigError for settings of which it can make nothing."""
    try:
        return make(**config) if isinstance(config, dict) else make(config)
    except Exception as error:  # whatever senseless settings provoke in transformers
        raise ConfigError(
            f"{where or 'vision tower'}: settings of which no tower can be made ({first_line(error)})"
        ) from None


def first_line(error: Exception) -> str:
    """The first line of a library's error, shortened; for errors of several lines the last says what is wrong."""
    lines = [line.strip() for line in str(error).strip().splitlines()] or [type(error).__name__]
    text = f"{lines[0]} {lines[-1]}" if lines[0].endswith(":") and len(lines) > 1 else lines[0]
    return text[:_LONGEST_REASON]


def _files(path: Path) -> list[Path]:
    if (path / _SINGLE).is_file():
        return [path / _SINGLE]
    index = path / _INDEX
    if not index.is_file():
        raise ConfigError(f"{path}: holds neither {_SINGLE} nor {_INDEX}; weights must be safetensors files")
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(weight_map.values()))
        inside = all(Path(name).name == name for name in names)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        names, inside = [], False
    if not names or not inside:
        raise ConfigError(f"{index}: no weight_map of files beside it; download the directory again")
    for name in names:
        if not (path / name).is_file():
            raise ConfigError(f"{path / name} is missing, one of the {len(names)} files that {_INDEX} names")
    return [path / name for name in names]
