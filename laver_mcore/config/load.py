"""YAML recipe + command line -> a checked `Config`.

The recipe is one mapping per section of `Config`, `objective: NAME`, and a section of that name; the command line is
flat and wins. `--config` may name a recipe that itself starts from another through a top-level `base: other.yaml`.
"""

import argparse
import contextlib
import io
import itertools
import sys
from collections.abc import Sequence
from dataclasses import asdict, field, fields, make_dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import tyro
import yaml
from pydantic import TypeAdapter, ValidationError

from laver_mcore.config.bounds import check_bounds
from laver_mcore.config.checks import check
from laver_mcore.config.errors import ConfigError, nearest
from laver_mcore.config.hugging_face import read_shape
from laver_mcore.config.objectives import known_objectives, section_of
from laver_mcore.config.presets import fill_from_preset
from laver_mcore.config.renamed import FLAGS, with_todays_keys
from laver_mcore.config.schema import Config, ObjectiveConfig
from laver_mcore.config.trainable import resolve_trainable

_SECTIONS: dict[str, type] = {
    f.name: type(getattr(Config(), f.name)) for f in fields(Config) if f.name != "objective"
}


def _section(name: str) -> type | None:
    """The class that a section of this name is read into: a part of `Config`, or the settings of an objective."""
    if name in _SECTIONS:
        return _SECTIONS[name]
    return section_of(name) if name in known_objectives() else None


class _Recipe(yaml.SafeLoader):
    """YAML in which a key that stands twice in one mapping is an error, and not the last one's."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"{key.value} stands twice", key.start_mark
                )
            seen.add(getattr(key, "value", ""))
        return super().construct_mapping(node, deep)


def read_recipe(path: str | Path, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Read a YAML recipe (and its `base`) into section -> field -> value, and "objective" -> its name.

    `ConfigError` names file and key. `above` are the recipes whose base this one is.
    """
    path = Path(path)
    try:
        own_base = path.resolve() in above
    except ValueError:  # a null byte, half of a surrogate pair
        raise ConfigError(f"recipe {str(path)!a} is no name of a file") from None
    if own_base:
        raise ConfigError(f"recipe {path} is its own base, by way of {' and '.join(p.name for p in above)}")
    try:
        raw = yaml.load(path.read_text(encoding="utf-8"), Loader=_Recipe) or {}
    except FileNotFoundError:
        raise ConfigError(f"recipe {path} does not exist") from None
    except OSError as error:
        raise ConfigError(f"recipe {path} cannot be read ({error.strerror})") from None
    except RecursionError:
        raise ConfigError(f"recipe {path} is nested too deeply") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"recipe {path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"recipe {path} must be a mapping of sections, got {type(raw).__name__}")
    raw = with_todays_keys(raw, path)
    base = raw.pop("base", None)
    if base is not None and not isinstance(base, str):
        raise ConfigError(f"{path}: base={base!r} is no path")
    recipe = read_recipe(path.parent / base, (*above, path.resolve())) if base else {}
    if "objective" in raw:
        recipe["objective"] = raw.pop("objective")
    for section, values in raw.items():
        _check_section(path, section, values)
        recipe.setdefault(section, {}).update(values or {})
    return recipe


def _check_section(path: Path, section: Any, values: Any) -> None:
    kind = _section(str(section))
    if kind is None:
        known = ["objective", *_SECTIONS, *known_objectives()]
        raise ConfigError(
            f"{path}: unknown section {section!r}; did you mean {nearest(str(section), known)!r}?"
        )
    if values is not None and not isinstance(values, dict):
        raise ConfigError(f"{path}: section {section} must be a mapping, got {type(values).__name__}")
    names = [f.name for f in fields(kind)]
    for name in values or {}:
        if name not in names:
            hint = f"; did you mean {nearest(str(name), names)!r}?" if names else ", which has none"
            raise ConfigError(f"{path}: unknown key {section}.{name}{hint}")


def _build_section(section: str, kind: type, values: dict[str, Any]) -> Any:
    for name, value in values.items():  # which pydantic would count as 0 and 1
        wanted = next((f.type for f in fields(kind) if f.name == name), None)
        if isinstance(value, bool) and "bool" not in str(wanted):
            raise ConfigError(f"{section}.{name}={value}: wants a value of another kind than true and false")
    adapter: TypeAdapter[Any] = TypeAdapter(kind)
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
    return _from_sections(read_recipe(path))


def _from_sections(recipe: dict[str, Any], objective: str | None = None) -> Config:
    name = str(objective or recipe.get("objective", ObjectiveConfig.name))
    for section, values in recipe.items():  # those of other objectives are checked as well
        if section != "objective" and section not in _SECTIONS:
            _build_section(section, section_of(section), values)
    sections = {s: _build_section(s, kind, recipe.get(s, {})) for s, kind in _SECTIONS.items()}
    return Config(objective=_build_section(name, section_of(name), recipe.get(name, {})), **sections)


def resolve(config: Config, *, on_paper: bool = False) -> Config:
    """Fill in the shape, that of the weights a run starts from or the preset's, and run every cross-field check.

    `on_paper`: weights that are not here yet are taken to be the preset's.
    """
    check_bounds(config)
    shape, source = None, config.run.hf_path or config.run.pretrained_checkpoint
    if config.run.hf_path is not None and not (on_paper and not Path(config.run.hf_path).exists()):
        shape = read_shape(config.run.hf_path)
    elif config.run.pretrained_checkpoint is not None:
        shape = _shape_of_run(Path(config.run.pretrained_checkpoint))
    for name, theirs in (shape or {}).items():
        ours = getattr(config.model, name)
        if ours is not None and ours != theirs:
            raise ConfigError(f"{name}={ours}, but {source} has {theirs}; leave {name} out")
    try:
        config = replace(config, model=fill_from_preset(config.model, shape))
    except ValueError as error:
        raise ConfigError(str(error)) from None
    if config.vision.normalize_visual_tokens is None:
        vision = replace(config.vision, normalize_visual_tokens=config.objective.normalizes)
        config = replace(config, vision=vision)
    config = replace(config, train=replace(config.train, trainable=resolve_trainable(config)))
    check(config)
    return config


_SHAPE = (
    "family", "num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "kv_channels",
    "vocab_size", "untie_embeddings_and_output_weights", "rotary_base", "rope_scaling", "norm_epsilon",
)  # fmt: skip
"""What a run takes over from the run whose weights it starts from: what those weights were trained in."""


def _shape_of_run(folder: Path) -> dict[str, Any] | None:
    """The decoder's shape by a run's config.yaml; None where there is none, which is refused where weights are read."""
    file = folder / "config.yaml"
    if not file.is_file():
        return None
    model = from_recipe(file).model
    return {name: getattr(model, name) for name in _SHAPE if getattr(model, name) is not None}


def to_yaml(config: Config) -> str:
    """The whole configuration as a recipe that reads back to the same one."""
    sections = asdict(config)
    settings = sections.pop("objective")
    if settings:
        sections[config.objective.name] = settings
    plain: dict[str, Any] = {"objective": config.objective.name}
    for section, values in sections.items():
        plain[section] = {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}
    return yaml.safe_dump(plain, sort_keys=False, default_flow_style=False)


def parse(argv: Sequence[str]) -> tuple[Config, argparse.Namespace]:
    """Parse the command line of a run -> (resolved configuration, what to do with it).

    The namespace holds `print_config` and `dry_run`. Raises `ConfigError`; `--help` prints and exits 0.
    """
    actions = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    actions.add_argument("--config")
    actions.add_argument("--objective")
    actions.add_argument("--print-config", "--print_config", action="store_true")
    actions.add_argument("--dry-run", "--dry_run", action="store_true")
    chosen, rest = actions.parse_known_args(_with_recipe_named(argv))
    recipe = read_recipe(chosen.config) if chosen.config else {}
    default = _from_sections(recipe, chosen.objective)
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            flat, unknown = tyro.cli(
                _command_line(default),
                prog=Path(sys.argv[0]).name,
                description=_DESCRIPTION,
                args=_check_flags(rest, default),
                config=(tyro.conf.OmitArgPrefixes,),
                return_unknown_args=True,
            )
    except SystemExit as exit_:
        if not exit_.code:  # --help
            raise
        raise ConfigError(_first_paragraph(said.getvalue()) or "the command line cannot be read") from None
    if unknown:
        raise ConfigError(f"unexpected argument {unknown[0]!r}; values follow a --flag")
    parts = {section: getattr(flat, section) for section in _SECTIONS}
    settings = getattr(flat, default.objective.name, default.objective)
    on_paper = chosen.dry_run or chosen.print_config
    return resolve(Config(objective=settings, **parts), on_paper=on_paper), chosen


def _with_recipe_named(argv: Sequence[str]) -> list[str]:
    """The command line with `--config` before a recipe that stands at its beginning alone: `stage2.yaml --lr 1e-5`."""
    if argv and argv[0].endswith((".yaml", ".yml")):
        if any(word.split("=")[0] == "--config" for word in argv):
            raise ConfigError(f"two recipes, {argv[0]} and --config; one may have the other as its base")
        return ["--config", *argv]
    return list(argv)


def _command_line(default: Config) -> Any:
    """A class with a field for every flag's section, the objective's own among them; its defaults are the recipe's."""
    shown = {section: getattr(default, section) for section in _SECTIONS}
    if fields(default.objective):
        shown[default.objective.name] = default.objective
    name = Annotated[str, tyro.conf.arg(help=_OBJECTIVE)]
    return make_dataclass(
        "Recipe",
        [
            ("objective", name, field(default=default.objective.name)),
            *((section, type(values), field(default=values)) for section, values in shown.items()),
        ],
        frozen=True,
        kw_only=True,
    )


def _first_paragraph(box: str) -> str:
    """What tyro's framed message says, without the frame and the help text below it."""
    lines = [line.strip("│╭╮╰╯─ ") for line in box.splitlines()[1:]]
    return " ".join(itertools.takewhile(bool, lines))


def _check_flags(args: list[str], default: Config) -> list[str]:
    """Refuse an unknown flag in one line that names its nearest neighbour, or the objective that it belongs to."""
    flat = {f.name for kind in (*_SECTIONS.values(), type(default.objective)) for f in fields(kind)}
    actions = {"help", "objective", "config", "dry_run", "print_config"}
    known = flat | actions | {f"no_{name}" for name in flat}
    for arg in args:
        if arg.startswith("--"):
            name = arg[2:].split("=", 1)[0].replace("-", "_")
            if name in FLAGS:
                raise ConfigError(f"{arg} is now {FLAGS[name]}")
            if name not in known:
                raise ConfigError(_unknown_flag(arg, name, default, known))
    return args


def _unknown_flag(arg: str, name: str, default: Config, known: set[str]) -> str:
    for other in known_objectives():
        if name.removeprefix("no_") in {f.name for f in fields(section_of(other))}:
            return f"{arg} is a setting of objective {other}, and this run's is {default.objective.name}"
    return f"unknown flag {arg}; did you mean --{nearest(name, sorted(known)).replace('_', '-')}?"


_OBJECTIVE = (
    "What is learned: lm (the language model's loss alone), laver, victor, viral, or what an installed "
    "package registers."
)
_DESCRIPTION = """Train a vision-language model with latent visual reconstruction (LaVer) on Megatron-Core.

Start from a recipe and override what you like; dashes and underscores are the same:
  torchrun --nproc-per-node 2 pretrain_laver.py --config examples/demo/stage2.yaml --tensor-model-parallel-size 2
  python pretrain_laver.py RECIPE --dry-run                 build and validate everything, print memory, train nothing
  python pretrain_laver.py RECIPE --print-config            show the resolved recipe
  python pretrain_laver.py --objective laver --help          the options of an objective as well
"""
