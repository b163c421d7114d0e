"""Reading recipes: strict YAML, ``extends``, overrides, and errors that name the key."""

from __future__ import annotations

import dataclasses
import re
import types
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from ssa.errors import ConfigError
from ssa.train.recipe import Recipe

RECIPES = Path(__file__).resolve().parent.parent / "recipes"

Section = TypeVar("Section")


def shipped_recipes() -> list[str]:
    """Names of the recipes in the package, such as ``quickstart/ssa``."""
    files = (path.relative_to(RECIPES).with_suffix("") for path in RECIPES.rglob("*.yaml") if path.stem != "base")
    return sorted(path.as_posix() for path in files)


def load_recipe(name_or_path: str | Path, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """Read a recipe.

    Args:
        name_or_path: a YAML file, or the name of a shipped recipe.
        overrides: values that replace the file's, by dotted key: ``{"optimizer.learning_rate": 3e-4}``.

    Raises:
        ConfigError: no such recipe, malformed YAML, an unknown, missing or ill-typed key, a value out of range.
    """
    path = _find(name_or_path)
    values = _read_extended(path, ())
    for dotted, value in (overrides or {}).items():
        section, _, key = dotted.partition(".") if "." in dotted else ("", "", dotted)
        target = values.setdefault(section, {}) if section else values
        if not isinstance(target, dict):
            raise ConfigError(section, _describe(target), "a section of keys")
        target[key] = value
    _refuse_unknown(values)
    _refuse_missing(values, str(path))
    return _build(Recipe, values, "")


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML that :func:`load_recipe` reads back to an equal recipe."""
    return yaml.safe_dump(recipe.to_dict(), sort_keys=False, allow_unicode=True)


def parse_value(text: str) -> Any:
    """A value as a recipe's YAML would read it: ``"1e-3"`` is a number.

    Raises:
        ConfigError: text that is no YAML.
    """
    try:
        return yaml.load(text, Loader=_StrictLoader)
    except yaml.YAMLError:
        raise ConfigError("value", repr(text), "a YAML value") from None


# ---------------------------------------------------------------------- files
def _find(name_or_path: str | Path) -> Path:
    path = Path(name_or_path)
    if "\0" in str(path):
        raise ConfigError("recipe", repr(str(path)), "a path without NUL")
    if path.is_file():
        return path
    shipped = RECIPES / f"{name_or_path}.yaml"
    if str(name_or_path) in shipped_recipes():
        return shipped
    near = get_close_matches(str(name_or_path), shipped_recipes(), n=1)
    known = ", ".join(shipped_recipes())
    raise ConfigError(
        f"recipe {str(name_or_path)!r}", "no such file", f"a YAML file or one of {known}", near[0] if near else None
    )


def _read_extended(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    """The file's values on top of those of the file it extends."""
    if path.resolve() in seen:
        raise ConfigError(f"{path}: extends", "a circle of files", "a base that does not extend this file again")
    values = _read_yaml(path)
    base = values.pop("extends", None)
    if base is None:
        return values
    beside = path.parent / f"{base}.yaml"
    shipped = RECIPES / f"{base}.yaml"
    found = next((file for file in (path.parent / str(base), beside, shipped) if file.is_file()), None)
    if not isinstance(base, str) or found is None:
        raise ConfigError(f"{path}: extends", repr(base), f"a file beside it ({beside.name}) or a shipped recipe")
    return _merge(_read_extended(found, (*seen, path.resolve())), values)


def _merge(base: dict[str, Any], top: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in top.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


class _StrictLoader(yaml.SafeLoader):
    """Plain data only, no duplicate keys, and YAML 1.2's floats (``1e-3`` is a string in PyYAML's 1.1)."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: dict[Any, int] = {}
        for key_node, _ in node.value:
            key, line = key_node.value, key_node.start_mark.line + 1
            if isinstance(key_node, yaml.ScalarNode) and key in seen:
                where = f"{self.name}:{line}"
                raise ConfigError(where, f"key {key!r} a second time (first in line {seen[key]})", "each key once")
            seen[str(key)] = line
        return super().construct_mapping(node, deep)


_StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d[\d_]*\.?\d*|\.\d+)[eE][-+]?\d+"), list("-+.0123456789")
)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        with path.open(encoding="utf-8") as file:
            values = yaml.load(file, Loader=_StrictLoader)
    except yaml.constructor.ConstructorError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else "?"
        raise ConfigError(f"{path}:{line}", f"unsafe or unknown tag ({error.problem})", "plain YAML") from None
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else "?"
        raise ConfigError(f"{path}:{line}", f"malformed YAML ({error.problem})", "valid YAML") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(str(path), f"unreadable text ({error})", "YAML in UTF-8") from None
    except OSError as error:
        raise ConfigError(str(path), error.strerror, "a readable file") from None
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise ConfigError(str(path), type(values).__name__, "a mapping of sections", "quickstart/ssa as an example")
    return values


# ---------------------------------------------------------------------- values to dataclasses
def _known_keys(cls: Any = Recipe, prefix: str = "") -> dict[str, dataclasses.Field[Any]]:
    """Every dotted key of a recipe that holds a value."""
    hints = get_type_hints(cls)
    known: dict[str, dataclasses.Field[Any]] = {}
    for item in dataclasses.fields(cls):
        if dataclasses.is_dataclass(hints[item.name]):
            known |= _known_keys(hints[item.name], f"{item.name}.")
        else:
            known[prefix + item.name] = item
    return known


def _refuse_unknown(values: Mapping[str, Any]) -> None:
    """Unknown keys, and values where a section belongs."""
    known = _known_keys()
    for key, value in values.items():
        if key in known:
            continue
        if not any(dotted.startswith(f"{key}.") for dotted in known):
            raise _unknown(str(key))
        if not isinstance(value, dict):
            raise ConfigError(str(key), _describe(value), "a section of keys")
        for inner in value:
            if f"{key}.{inner}" not in known:
                raise _unknown(f"{key}.{inner}")


def _refuse_missing(values: Mapping[str, Any], source: str) -> None:
    """All required keys that are absent, in one message."""
    missing = []
    for dotted, item in _known_keys().items():
        section, _, key = dotted.rpartition(".")
        given = values.get(section, {}) if section else values
        if item.default is dataclasses.MISSING and key not in given:
            missing.append(dotted)
    if missing:
        hint = None if values else "extends: quickstart/base"
        raise ConfigError(source, "no value" if values else "an empty recipe", f"values for {', '.join(missing)}", hint)


def _unknown(dotted: str) -> ConfigError:
    known = list(_known_keys())
    section, _, key = dotted.rpartition(".")
    near = get_close_matches(dotted, known, n=1, cutoff=0.75)
    if not near:  # right key, wrong section
        leaves = {name.rpartition(".")[2]: name for name in known}
        near = [leaves[leaf] for leaf in get_close_matches(key, leaves, n=1, cutoff=0.75)]
    siblings = [name.rpartition(".")[2] for name in known if name.rpartition(".")[0] == section]
    expected = f"one of {', '.join(siblings)}" if siblings else "data, model, optimizer, training, name, seed, output"
    return ConfigError(dotted, "an unknown key", expected, f"{near[0]} (did you mean it?)" if near else None)


def _build(cls: type[Section], values: Mapping[str, Any], prefix: str) -> Section:
    """A dataclass from plain values, with its sections."""
    hints, arguments = get_type_hints(cls), {}
    for key, value in values.items():
        kind, dotted = hints[key], f"{prefix}{key}"
        section = dataclasses.is_dataclass(kind)
        arguments[key] = _build(kind, value, f"{dotted}.") if section else _convert(value, kind, dotted)
    return cls(**arguments)


def _convert(value: Any, kind: Any, key: str) -> Any:
    """``value`` as ``kind``, or a type error naming the key. Nothing is guessed but whole floats as integers."""
    origin = get_origin(kind)
    if origin in (Union, types.UnionType):
        inner = next(part for part in get_args(kind) if part is not types.NoneType)
        return None if value is None else _convert(value, inner, key)
    if origin is Literal:
        if value in get_args(kind):
            return value
        raise ConfigError(key, _describe(value), f"one of {', '.join(map(str, get_args(kind)))}")
    if origin is tuple:
        parts = get_args(kind)
        if parts[-1] is Ellipsis:
            if not isinstance(value, list | tuple):
                raise ConfigError(key, _describe(value), "a list", f"[{value}]" if isinstance(value, str) else None)
            return tuple(_convert(v, parts[0], f"{key}[{i}]") for i, v in enumerate(value))
        if isinstance(value, list | tuple) and len(value) == len(parts):
            return tuple(_convert(v, part, f"{key}[{i}]") for i, (v, part) in enumerate(zip(value, parts, strict=True)))
        raise ConfigError(key, _describe(value), f"a list of {len(parts)} numbers")
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if kind is float and number:
        return float(value)
    if kind is int and number and float(value).is_integer():
        return int(value)
    if kind in (bool, str) and isinstance(value, kind):
        return value
    names = {float: "a number", int: "an integer", bool: "true or false", str: "a text"}
    hint = "quotes around it" if kind is str else "it without quotes" if isinstance(value, str) else None
    raise ConfigError(key, _describe(value), names[kind], hint)


def _describe(value: Any) -> str:
    return "null" if value is None else f"{value!r} ({type(value).__name__})"
