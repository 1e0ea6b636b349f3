"""YAML to dataclasses with typed checks: an unknown key, a wrong type or a bad choice is an error that names file, line
and key.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, Union

import yaml

from micro.errors import choices

T = TypeVar("T")
Key = tuple[str | int, ...]


class RecipeError(ValueError):
    """A recipe that cannot be run. The message names the file, the line, the key and what to do."""


class Source:
    """Where each key of a YAML file stands, so that errors can say so."""

    def __init__(self, path: str, lines: dict[Key, int] | None = None) -> None:
        self.path = path
        self.lines = lines or {}

    def error(self, key: Key, message: str) -> RecipeError:
        """The error for `key`: "file:line: key: message"."""
        line = self.lines.get(key)
        place = self.path if line is None else f"{self.path}:{line}"
        return RecipeError(f"{place}: {dotted(key)}: {message}" if key else f"{place}: {message}")


def dotted(key: Key) -> str:
    """("stages", 0, "name") as "stages[0].name"."""
    text = ""
    for part in key:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


def read_yaml(path: Path) -> tuple[Any, Source]:
    """The file's content and the lines of its keys. Errors: RecipeError for a missing file or broken YAML."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise RecipeError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: cannot be read: {error}") from None
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"{path}: not valid YAML: {error}") from None
    source = Source(str(path))
    if node is not None:
        _collect_lines(node, (), source, str(path))
    return value, source


def _collect_lines(node: yaml.Node, key: Key, source: Source, path: str) -> None:
    """Fill source.lines from the YAML tree; a key that stands twice is an error (YAML itself keeps the last in
    silence).
    """
    source.lines[key] = node.start_mark.line + 1
    if isinstance(node, yaml.MappingNode):
        for name, child in node.value:
            here = (*key, str(name.value))
            if here in source.lines:
                raise RecipeError(f"{path}:{name.start_mark.line + 1}: {dotted(here)} stands twice")
            _collect_lines(child, here, source, path)
    elif isinstance(node, yaml.SequenceNode):
        for index, child in enumerate(node.value):
            _collect_lines(child, (*key, index), source, path)


def build(kind: type[T], value: Any, source: Source, key: Key = ()) -> T:
    """A dataclass from a mapping. Errors: RecipeError for unknown keys, missing keys, wrong types."""
    if not isinstance(value, Mapping):
        raise source.error(key, f"expected a mapping with the keys of {kind.__name__}, got {_shown(value)}")
    fields = {f.name: f for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    for name in value:
        if name not in fields:
            raise source.error((*key, str(name)), f"unknown key; {choices(str(name), fields)}")
    hints = typing.get_type_hints(kind)
    given = {name: convert(hints[name], item, source, (*key, name)) for name, item in value.items()}
    for name, f in fields.items():
        required = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        if required and name not in given:
            raise source.error(key, f"the key {name!r} is missing")
    try:
        return kind(**given)
    except RecipeError:
        raise
    except ValueError as error:
        raise source.error(key, str(error)) from None


def convert(hint: Any, value: Any, source: Source, key: Key) -> Any:
    """`value` as the type `hint` says. Numbers written as 2e-5 (text, for YAML 1.1) count as numbers."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (Union, types.UnionType):
        return _convert_union(arguments, value, source, key)
    if origin is Literal:
        if value not in arguments:
            choices = ", ".join(map(str, arguments))
            raise source.error(key, f"expected one of {choices}, got {_shown(value)}")
        return value
    if origin is list:
        if not isinstance(value, list):
            raise source.error(key, f"expected a list, got {_shown(value)}")
        return [convert(arguments[0], item, source, (*key, i)) for i, item in enumerate(value)]
    if origin is dict:
        if not isinstance(value, Mapping):
            raise source.error(key, f"expected a mapping, got {_shown(value)}")
        return {str(name): convert(arguments[1], item, source, (*key, str(name))) for name, item in value.items()}
    if dataclasses.is_dataclass(hint):
        return build(hint, value, source, key)  # type: ignore[arg-type]
    return _convert_scalar(hint, value, source, key)


def _convert_union(arguments: tuple[Any, ...], value: Any, source: Source, key: Key) -> Any:
    """The one alternative that has the value's shape; its own error is the one that is shown."""
    if value is None and type(None) in arguments:
        return None
    for hint in arguments:
        if _has_shape(hint, value):
            return convert(hint, value, source, key)
    names = " or ".join(_named(hint) for hint in arguments)
    raise source.error(key, f"expected {names}, got {_shown(value)}")


def _has_shape(hint: Any, value: Any) -> bool:
    origin = typing.get_origin(hint)
    if origin is Literal:
        return value in typing.get_args(hint)
    if origin is list:
        return isinstance(value, list)
    if origin is dict or dataclasses.is_dataclass(hint):
        return isinstance(value, Mapping)
    if hint is str:
        return isinstance(value, str)
    return hint is not type(None) and _scalar(hint, value) is not None


def _convert_scalar(hint: Any, value: Any, source: Source, key: Key) -> Any:
    converted = _scalar(hint, value)
    if converted is None:
        raise source.error(key, f"expected {_named(hint)}, got {_shown(value)}")
    return converted


def _scalar(hint: Any, value: Any) -> Any:
    """The value as bool, int, float or str; None where it is none of that type."""
    if hint is bool or isinstance(value, bool):
        return value if hint is bool and isinstance(value, bool) else None
    if hint is int:
        return value if isinstance(value, int) else None
    if hint is float:
        try:
            return float(value) if isinstance(value, (int, float, str)) else None
        except ValueError:
            return None
    return value if hint is str and isinstance(value, str) else None


def _named(hint: Any) -> str:
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "text", type(None): "nothing"}
    if typing.get_origin(hint) is Literal:
        return " or ".join(map(str, typing.get_args(hint)))
    if typing.get_origin(hint) is list:
        return "a list"
    return names.get(hint, "a mapping")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def apply_overrides(value: dict[str, Any], overrides: list[str]) -> dict[str, Any]:
    """The recipe with `a.b=c` settings applied; `stages.0.name=x` and `stages.induce.name=x` (by the stage's name) both
    work.

    Values are YAML. Errors: RecipeError for a setting without "=", a path through a value that is no mapping, a missing
    stage.
    """
    result: dict[str, Any] = _copied(value)
    for override in overrides:
        path, equals, text = override.partition("=")
        if not equals or not path:
            raise RecipeError(f"{override!r}: a setting is KEY=VALUE, for example max_length=512")
        try:
            parsed = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise RecipeError(f"{override!r}: the value is not valid YAML: {error}") from None
        _set(result, path.split("."), parsed, override)
    return result


def _set(target: Any, path: list[str], value: Any, override: str) -> None:
    for depth, part in enumerate(path):
        last = depth == len(path) - 1
        if isinstance(target, list):
            index = _index(target, part, override)
            if last:
                target[index] = value
            else:
                target = target[index]
        elif isinstance(target, dict):
            if last:
                target[part] = value
            else:
                target = target.setdefault(part, {}) if target.get(part) is not None else _fresh(target, part)
        else:
            raise RecipeError(f"{override!r}: {'.'.join(path[:depth])} is {_shown(target)}, it has no key {part!r}")


def _fresh(target: dict[str, Any], part: str) -> dict[str, Any]:
    target[part] = {}
    return target[part]  # type: ignore[no-any-return]


def _index(items: list[Any], part: str, override: str) -> int:
    if part.isdigit() and int(part) < len(items):
        return int(part)
    names = [str(item.get("name")) if isinstance(item, dict) else str(i) for i, item in enumerate(items)]
    if part in names:
        return names.index(part)
    raise RecipeError(f"{override!r}: no entry {part!r}; {choices(part, names)}")


def _copied(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _copied(item) for name, item in value.items()}
    return [_copied(item) for item in value] if isinstance(value, list) else value
