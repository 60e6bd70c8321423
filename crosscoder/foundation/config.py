"""Frozen dataclasses to JSON and back, strictly: unknown keys and wrong types are refused with the mend."""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")
KIND = "kind"


def to_mapping(config: Any) -> Any:
    """Plain JSON values of a dataclass; a dataclass inside a union is tagged with `kind`, its class name."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        hints = typing.get_type_hints(type(config))
        mapping = {}
        for field in dataclasses.fields(config):
            value = getattr(config, field.name)
            mapping[field.name] = to_mapping(value)
            if dataclasses.is_dataclass(value) and len(_dataclass_options(hints[field.name])) > 1:
                mapping[field.name][KIND] = type(value).__name__
        return mapping
    if isinstance(config, tuple | list):
        return [to_mapping(item) for item in config]
    if isinstance(config, Path):
        return str(config)
    return config


def from_mapping(cls: type[T], mapping: Any, *, where: str = "") -> T:
    """The dataclass `cls` built from JSON values.

    Raises:
        ValueError: an unknown key (the nearest valid one is named), a missing key, a wrong type, a non-finite
            number, or a value the dataclass itself refuses.
    """
    where = where or cls.__name__
    if not isinstance(mapping, dict):
        raise ValueError(f"{where}: expected a table of settings, got {type(mapping).__name__}")
    fields = {field.name: field for field in dataclasses.fields(cls)}  # ty: ignore[invalid-argument-type]
    for key in mapping:
        if key not in fields:
            raise ValueError(unknown_key_message(str(key), list(fields), where))
    hints = typing.get_type_hints(cls)
    values = {key: _convert(hints[key], value, f"{where}.{key}") for key, value in mapping.items()}
    missing = [
        name
        for name, field in fields.items()
        if name not in values and field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ValueError(f"{where}: missing {', '.join(missing)}")
    return cls(**values)


def unknown_key_message(key: str, valid: list[str], where: str) -> str:
    """What to say about a setting that does not exist."""
    near = difflib.get_close_matches(key, valid, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"valid settings: {', '.join(sorted(valid))}"
    return f"{where}: unknown setting {key!r}; {hint}"


def _dataclass_options(hint: Any) -> list[type]:
    options = typing.get_args(hint) if _is_union(hint) else (hint,)
    return [option for option in options if dataclasses.is_dataclass(option)]


def _is_union(hint: Any) -> bool:
    return typing.get_origin(hint) in (typing.Union, types.UnionType)


def _convert(hint: Any, value: Any, where: str) -> Any:
    options = _dataclass_options(hint)
    if options and isinstance(value, dict):
        return _convert_dataclass(options, value, where)
    if _is_union(hint):
        for option in typing.get_args(hint):
            try:
                return _convert(option, value, where)
            except ValueError:
                continue
        raise ValueError(f"{where}: {value!r} is not a {hint}")
    origin = typing.get_origin(hint)
    if origin is typing.Literal:
        if value not in typing.get_args(hint):
            raise ValueError(f"{where}: {value!r} is not one of {list(typing.get_args(hint))}")
        return value
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise ValueError(f"{where}: expected a list, got {value!r}")
        inner = typing.get_args(hint)[0]
        return tuple(_convert(inner, item, f"{where}[{i}]") for i, item in enumerate(value))
    return _convert_scalar(hint, value, where)


def _convert_dataclass(options: list[type], value: dict[str, Any], where: str) -> Any:
    if len(options) == 1:
        return from_mapping(options[0], {k: v for k, v in value.items() if k != KIND}, where=where)
    by_name = {option.__name__: option for option in options}
    kind = value.get(KIND)
    if kind not in by_name:
        raise ValueError(f"{where}: {KIND} is {kind!r}, expected one of {sorted(by_name)}")
    return from_mapping(by_name[kind], {k: v for k, v in value.items() if k != KIND}, where=where)


def _convert_scalar(hint: Any, value: Any, where: str) -> Any:
    if hint is Any:
        return value
    if hint is type(None):
        if value is None:
            return None
    elif hint is bool:
        if isinstance(value, bool):
            return value
    elif hint is int:
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    elif hint is float:
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            return float(value)
    elif hint is Path:
        if isinstance(value, str):
            return Path(value)
    elif isinstance(hint, type) and isinstance(value, hint):
        return value
    raise ValueError(f"{where}: expected {getattr(hint, '__name__', hint)}, got {value!r}")
