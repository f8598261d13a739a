"""The one route from a YAML file and `key=value` words to a frozen dataclass.

Strict on purpose: an unknown key, a wrong type or a missing value is one `ConfigError` line that
names the key, the value and what is allowed. What the values mean is the business of the dataclass.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml

from trimode.errors import ConfigError

T = TypeVar("T")
_MISSING = dataclasses.MISSING


class _Loader(yaml.SafeLoader):
    """Safe YAML that reads `1e-3` as a number (YAML 1.1 wants `1.0e-3`) and refuses double keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise ConfigError(f"key {key!r} is given twice (line {node.start_mark.line + 1})")
        return super().construct_mapping(node, deep=deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:[0-9][0-9_]*)(?:\.[0-9_]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


def read_config(cls: type[T], path: str | Path, overrides: Sequence[str] = ()) -> T:
    """Read a YAML file into the dataclass `cls`, then apply `a.b=value` overrides in order.

    Args:
        cls: A dataclass type; nested dataclasses, lists or tuples of them, mappings, `X | None`
            and `Literal` fields are understood. Its `__post_init__` may raise `ConfigError`.
        path: The YAML file.
        overrides: Words such as `optimizer.learning_rate=1e-3` or `stages.0.tokens=1000`; the
            value is parsed as YAML.

    Raises:
        ConfigError: Missing file, not a mapping, unknown key, wrong type or missing value.
    """
    tree = _read_mapping(Path(path))
    for word in overrides:
        _apply_override(tree, word)
    value = _convert(tree, cls, "")
    return typing.cast(T, value)


def _read_mapping(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"config file {str(path)!r} does not exist") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"config file {str(path)!r} cannot be read: {error}") from None
    tree = _parse_yaml(text, f"config file {str(path)!r}")
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(
            f"config file {str(path)!r} must hold a mapping of keys to values, "
            f"not a {type(tree).__name__}"
        )
    return tree


def _parse_yaml(text: str, what: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)
    except ConfigError as error:
        raise ConfigError(f"{what}: {error}") from None
    except yaml.YAMLError as error:
        problem = " ".join(str(error).split())
        raise ConfigError(f"{what} is not valid YAML: {problem}") from None


def _apply_override(tree: dict[str, Any], word: str) -> None:
    """Set one `a.b.0.c=value` in the tree read from YAML; checked later by `_convert`."""
    key, equals, text = word.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise ConfigError(f"override {word!r} must look like key=value or part.key=value")
    node: Any = tree
    for depth, part in enumerate(parts[:-1]):
        node = _descend(node, part, ".".join(parts[: depth + 1]), word)
    _assign(node, parts[-1], _parse_yaml(text, f"override {word!r}"), word)


def _descend(node: Any, part: str, where: str, word: str) -> Any:
    if isinstance(node, list):
        child = node[_index(node, part, word)]
    else:
        child = node.setdefault(part, {})
        if child is None:
            child = node[part] = {}
    if not isinstance(child, (dict, list)):
        raise ConfigError(f"override {word!r}: {where} is {child!r}, which has no parts")
    return child


def _assign(node: Any, part: str, value: Any, word: str) -> None:
    if isinstance(node, list):
        node[_index(node, part, word)] = value
    else:
        node[part] = value


def _index(node: list[Any], part: str, word: str) -> int:
    if not (part.isascii() and part.isdigit()) or int(part) >= len(node):
        raise ConfigError(
            f"override {word!r}: {part!r} must be an index from 0 to {len(node) - 1} of that list"
        )
    return int(part)


def _convert(value: Any, hint: Any, key: str) -> Any:
    """`value` from YAML as the type `hint`, or a `ConfigError` that names `key`."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (types.UnionType, typing.Union):
        return _convert_union(value, args, key)
    if origin is typing.Literal:
        if any(value == arg and type(value) is type(arg) for arg in args):
            return value
        raise _wrong(key, value, "one of " + _type_name(hint))
    if dataclasses.is_dataclass(hint):
        return _convert_dataclass(value, typing.cast(type, hint), key)
    if origin in (list, tuple):
        return _convert_sequence(value, origin, args, key)
    if origin is dict or hint is dict or origin is Mapping:
        return _convert_mapping(value, args or (str, Any), key)
    return _convert_scalar(value, hint, key)


def _convert_union(value: Any, args: tuple[Any, ...], key: str) -> Any:
    if value is None and type(None) in args:
        return None
    options = [arg for arg in args if arg is not type(None)]
    for index, option in enumerate(options):
        try:
            return _convert(value, option, key)
        except ConfigError:
            if index == len(options) - 1 and len(options) == 1:
                raise
    raise _wrong(key, value, " or ".join(_type_name(option) for option in options))


def _convert_dataclass(value: Any, cls: Any, key: str) -> Any:
    if not isinstance(value, dict):
        raise _wrong(key, value, "a mapping of keys to values")
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}
    for name in value:
        if name not in fields:
            raise ConfigError(_unknown_key(str(name), list(fields), key))
    required = [
        name
        for name, field in fields.items()
        if field.default is _MISSING and field.default_factory is _MISSING and name not in value
    ]
    if required:
        raise ConfigError(f"{_join(key, required[0])} is missing and has no default")
    kwargs = {name: _convert(item, hints[name], _join(key, name)) for name, item in value.items()}
    try:
        return cls(**kwargs)
    except ConfigError as error:
        raise ConfigError(f"{key}: {error}" if key else str(error)) from None


def _convert_sequence(value: Any, origin: type, args: tuple[Any, ...], key: str) -> Any:
    if not isinstance(value, list):
        raise _wrong(key, value, "a list")
    item_hint = args[0] if args else Any
    if origin is tuple and len(args) > 1 and args[1] is not Ellipsis:
        if len(value) != len(args):
            raise _wrong(key, value, f"a list of {len(args)} values")
        pairs = list(zip(value, args, strict=True))
    else:
        pairs = [(item, item_hint) for item in value]
    return origin(_convert(item, hint, f"{key}.{i}") for i, (item, hint) in enumerate(pairs))


def _convert_mapping(value: Any, args: tuple[Any, ...], key: str) -> Any:
    if not isinstance(value, dict):
        raise _wrong(key, value, "a mapping of keys to values")
    return {
        _convert(name, args[0], key): _convert(item, args[1], _join(key, str(name)))
        for name, item in value.items()
    }


def _convert_scalar(value: Any, hint: Any, key: str) -> Any:
    if hint is float and type(value) is int:
        return float(value)
    if hint is Path and type(value) is str:
        return Path(value)
    if hint in (bool, int, float, str) and type(value) is hint:
        return value
    raise _wrong(key, value, _type_name(hint))


def _unknown_key(name: str, allowed: list[str], key: str) -> str:
    close = difflib.get_close_matches(name, allowed, n=1, cutoff=0.5)
    hint = f"did you mean {_join(key, close[0])}? " if close else ""
    return f"unknown key {_join(key, name)}: {hint}allowed here: {', '.join(allowed)}"


def _wrong(key: str, value: Any, allowed: str) -> ConfigError:
    got = "a mapping" if isinstance(value, dict) else repr(value)
    return ConfigError(f"{key or 'the config'} is {got}, but must be {allowed}")


def _type_name(hint: Any) -> str:
    if typing.get_origin(hint) is typing.Literal:
        return ", ".join(str(arg) for arg in typing.get_args(hint))
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "a string"}
    return names.get(hint, getattr(hint, "__name__", str(hint)))


def _join(key: str, name: str) -> str:
    return f"{key}.{name}" if key else name
