"""YAML recipe + command line -> a checked `Config`.

The recipe is one mapping per section of `Config`; the command line is flat and wins. `--config` may name a recipe
that itself starts from another through a top-level `base: other.yaml`.
"""

import argparse
import contextlib
import io
import itertools
from collections.abc import Sequence
from dataclasses import asdict, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import tyro
import yaml
from pydantic import ConfigDict, TypeAdapter, ValidationError

from laver_mcore.config.checks import check
from laver_mcore.config.errors import ConfigError, nearest
from laver_mcore.config.hugging_face import read_shape
from laver_mcore.config.presets import fill_from_preset
from laver_mcore.config.renamed import FLAGS, with_todays_keys
from laver_mcore.config.schema import Config

_SECTIONS = {f.name: f.default_factory for f in fields(Config)}  # type: ignore[misc]
_FLAT = tuple(f.name for make in _SECTIONS.values() for f in fields(make()))  # type: ignore[operator,misc]


def read_recipe(path: str | Path) -> dict[str, dict[str, Any]]:
    """Read a YAML recipe (and its `base`) into section -> field -> value; `ConfigError` names file and key."""
    path = Path(path)
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except FileNotFoundError:
        raise ConfigError(f"recipe {path} does not exist") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"recipe {path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"recipe {path} must be a mapping of sections, got {type(raw).__name__}")
    raw = with_todays_keys(raw, path)
    base = raw.pop("base", None)
    recipe = read_recipe(path.parent / base) if base else {}
    for section, values in raw.items():
        if section not in _SECTIONS:
            raise ConfigError(
                f"{path}: unknown section {section!r}; did you mean {nearest(str(section), list(_SECTIONS))!r}?"
            )
        if values is not None and not isinstance(values, dict):
            raise ConfigError(f"{path}: section {section} must be a mapping, got {type(values).__name__}")
        names = [f.name for f in fields(_SECTIONS[section]())]  # type: ignore[operator]
        for name in values or {}:
            if name not in names:
                raise ConfigError(
                    f"{path}: unknown key {section}.{name}; did you mean {nearest(str(name), names)!r}?"
                )
        recipe.setdefault(section, {}).update(values or {})
    return recipe


def _build_section(section: str, values: dict[str, Any]) -> Any:
    kind = type(_SECTIONS[section]())  # type: ignore[operator]
    adapter: TypeAdapter[Any] = TypeAdapter(kind, config=None if is_dataclass(kind) else ConfigDict())
    try:
        return adapter.validate_python(values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join([section, *(str(part) for part in first["loc"])])
        raise ConfigError(
            f"{where}={first['input']!r}: {first['msg'][0].lower()}{first['msg'][1:]}"
        ) from None


def from_recipe(path: str | Path) -> Config:
    """The configuration a recipe alone describes, types checked, presets not yet filled in."""
    recipe = read_recipe(path)
    return Config(**{section: _build_section(section, recipe.get(section, {})) for section in _SECTIONS})


def resolve(config: Config) -> Config:
    """Fill in the preset's shape and run every cross-field check."""
    shape = None
    if config.run.hf_path is not None:
        shape = read_shape(config.run.hf_path)
        for name, theirs in shape.items():
            ours = getattr(config.model, name)
            if ours is not None and ours != theirs:
                raise ConfigError(f"{name}={ours}, but {config.run.hf_path} has {theirs}; leave {name} out")
    try:
        config = replace(config, model=fill_from_preset(config.model, shape))
    except ValueError as error:
        raise ConfigError(str(error)) from None
    check(config)
    return config


def to_yaml(config: Config) -> str:
    """The whole configuration as a recipe that reads back to the same one."""
    plain = {
        section: {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}
        for section, values in asdict(config).items()
    }
    return yaml.safe_dump(plain, sort_keys=False, default_flow_style=False)


def parse(argv: Sequence[str]) -> tuple[Config, argparse.Namespace]:
    """Parse the command line of `pretrain_laver.py` -> (resolved configuration, what to do with it).

    The namespace holds `print_config` and `dry_run`. Raises `ConfigError`; `--help` prints and exits 0.
    """
    actions = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    actions.add_argument("--config")
    actions.add_argument("--print-config", "--print_config", action="store_true")
    actions.add_argument("--dry-run", "--dry_run", action="store_true")
    chosen, rest = actions.parse_known_args(list(argv))
    default = from_recipe(chosen.config) if chosen.config else Config()
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            config, unknown = tyro.cli(
                Config,
                prog="pretrain_laver.py",
                description=_DESCRIPTION,
                default=default,
                args=_check_flags(rest),
                config=(tyro.conf.OmitArgPrefixes,),
                return_unknown_args=True,
            )
    except SystemExit as exit_:
        if not exit_.code:  # --help
            raise
        raise ConfigError(_first_paragraph(said.getvalue()) or "the command line cannot be read") from None
    if unknown:
        raise ConfigError(f"unexpected argument {unknown[0]!r}; values follow a --flag")
    return resolve(config), chosen


def _first_paragraph(box: str) -> str:
    """What tyro's framed message says, without the frame and the help text below it."""
    lines = [line.strip("│╭╮╰╯─ ") for line in box.splitlines()[1:]]
    return " ".join(itertools.takewhile(bool, lines))


def _check_flags(args: list[str]) -> list[str]:
    """Refuse an unknown flag in one line that names its nearest neighbour."""
    known = {*_FLAT, *(f"no_{name}" for name in _FLAT), "help"}
    for arg in args:
        if arg.startswith("--"):
            name = arg[2:].split("=", 1)[0].replace("-", "_")
            if name in FLAGS:
                raise ConfigError(f"{arg} is now {FLAGS[name]}")
            if name not in known:
                raise ConfigError(
                    f"unknown flag {arg}; did you mean --{nearest(name, sorted(known)).replace('_', '-')}?"
                )
    return args


_DESCRIPTION = """Train a vision-language model with latent visual reconstruction (LaVer) on Megatron-Core.

Start from a recipe and override what you like; dashes and underscores are the same:
  torchrun --nproc-per-node 2 pretrain_laver.py --config examples/demo/stage2.yaml --tensor-model-parallel-size 2
  python pretrain_laver.py --config RECIPE --dry-run        build and validate everything, print memory, train nothing
  python pretrain_laver.py --config RECIPE --print-config   show the resolved recipe
"""
