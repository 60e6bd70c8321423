"""Settings that are checked where they are made, and their JSON form.

    @config
    class Fit:
        steps: PositiveInt | None = None
        decay: Annotated[float, Field(ge=0, le=1)] = 0.3

A config is a frozen, keyword-only dataclass (`@config(kw_only=False)` allows `TopK(32)`) whose fields pydantic checks,
strictly: no `True` or `"3"` for 3, no NaN or infinity; a whole number may stand for a float. Bounds stand in the
annotations; `__post_init__` raises ValueError for what spans fields. `dataclasses.replace` checks again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import functools
import types
import typing
from pathlib import Path
from typing import Any, TypeVar

import pydantic.dataclasses
from pydantic import ConfigDict, ValidationError

T = TypeVar("T")
KIND = "kind"
MOST_SAID = 12  # faults that one error lists
STRICT = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


@typing.dataclass_transform(kw_only_default=True, frozen_default=True)
def config(cls: Any = None, *, kw_only: bool = True) -> Any:
    """Class decorator: `cls` as a config. What does not fit its annotations is refused by one clear ValueError."""
    if cls is None:
        return functools.partial(config, kw_only=kw_only)
    made: Any = pydantic.dataclasses.dataclass(cls, frozen=True, kw_only=kw_only, config=STRICT)
    checked = made.__init__

    @functools.wraps(checked)
    def init(self: Any, *args: Any, **settings: Any) -> None:
        try:
            checked(self, *args, **settings)
        except ValidationError as error:
            raise ValueError(_message(made, error)) from None
        except OverflowError as error:
            given = ", ".join(f"{name} {_brief(value)}" for name, value in settings.items())
            raise ValueError(f"a number is out of range ({error}): {given}") from None

    made.__init__ = init
    return made


def require_count(least: int = 1, **settings: Any) -> None:
    """Refuse numbers that are to count something and do not: fractions, flags, words, and any below `least`.

    None is let through: it stands for a default.
    """
    for name, value in settings.items():
        if value is not None and (type(value) is not int or not least <= value < 2**63):
            raise ValueError(f"{name} is {_brief(value)}, expected a whole number of at least {least}")


def to_mapping(value: Any) -> Any:
    """Plain JSON values of a dataclass; a dataclass inside a union is tagged with `kind`, its class name."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        mapping = {field.name: to_mapping(getattr(value, field.name)) for field in dataclasses.fields(value)}
        for name, hint in _hints(type(value)).items():
            if len(_configs(hint)) > 1 and isinstance(mapping[name], dict):
                mapping[name][KIND] = type(getattr(value, name)).__name__
        return mapping
    if isinstance(value, tuple | list):
        return [to_mapping(item) for item in value]
    if isinstance(value, dict):
        return {key: to_mapping(item) for key, item in value.items()}
    return str(value) if isinstance(value, Path) else value


def from_mapping(cls: type[T], mapping: Any, *, where: str = "") -> T:
    """The config `cls` that `to_mapping` made `mapping` of.

    Raises:
        ValueError: an unknown key (the nearest valid one is named), a missing key, or a value that `cls` refuses; says
            where, counted from `where`.
    """
    where = where or cls.__name__
    if not isinstance(mapping, dict):
        raise ValueError(f"{where}: expected a table of settings, got {type(mapping).__name__}")
    hints = _hints(cls)
    values = {key: _from_json(hints.get(key), value, f"{where}.{key}") for key, value in mapping.items()}
    try:
        return cls(**values)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _from_json(hint: Any, value: Any, where: str) -> Any:
    """`value` with its lists as tuples, paths as paths and tables as configs, as far as `hint` asks for them."""
    if isinstance(value, dict) and (options := {option.__name__: option for option in _configs(hint)}):
        kind = value.get(KIND, next(iter(options)) if len(options) == 1 else None)
        if not isinstance(kind, str) or kind not in options:
            raise ValueError(f"{where}: {KIND} is {_brief(kind)}, expected one of {sorted(options)}")
        return from_mapping(options[kind], {key: item for key, item in value.items() if key != KIND}, where=where)
    if isinstance(value, list) and (items := [item for option in _options(hint) for item in typing.get_args(option)]):
        return tuple(_from_json(items[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    return Path(value) if isinstance(value, str) and Path in _options(hint) else value


def _message(cls: type, error: ValidationError) -> str:
    """One line for what pydantic lists: what was seen in each wrong setting, and what was expected."""
    names, said = list(_hints(cls)), {}
    for found in error.errors():
        name, *inner = found["loc"] or ("",)
        name = names[name] if isinstance(name, int) and name < len(names) else str(name)
        where = name + "".join(f"[{part}]" for part in inner if isinstance(part, int))
        match found["type"]:
            case "value_error":
                said[where] = str(found["ctx"]["error"])
            case "missing" | "missing_argument" | "missing_keyword_only_argument":
                said[where] = f"missing {name}"
            case "unexpected_keyword_argument":
                near = difflib.get_close_matches(name, names, n=1)
                hint = f"did you mean {near[0]!r}?" if near else f"valid settings: {', '.join(sorted(names))}"
                said[where] = f"unknown setting {name!r:.80}; {hint}"
            case _:
                expected = found["msg"].removeprefix("Input should be ")
                expected = f"a number {expected}" if expected.startswith(("greater", "less")) else expected
                seen = said.get(where, f"{where} is {_brief(found['input'])}; expected")
                said[where] = f"{seen} or {expected}" if where in said else f"{seen} {expected}"
    more = len(said) - MOST_SAID
    return "; ".join([*list(said.values())[:MOST_SAID], *([f"and {more} more of the kind"] if more > 0 else [])])


def _brief(value: Any) -> str:
    """What was seen, as far as it fits a line."""
    with contextlib.suppress(ValueError):  # a number of thousands of digits cannot be written
        said = repr(value)
        return said if len(said) <= 80 else f"{said[:77]}..."
    return "a number of thousands of digits"


def _hints(cls: type) -> dict[str, Any]:
    """The annotation of each field, in the order of the fields."""
    hints = typing.get_type_hints(cls, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}  # ty: ignore[invalid-argument-type]


def _options(hint: Any) -> tuple[Any, ...]:
    """The types that a union allows, or the one that stands alone."""
    if typing.get_origin(hint) is typing.Annotated:
        return _options(typing.get_args(hint)[0])
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)


def _configs(hint: Any) -> list[type]:
    return [option for option in _options(hint) if dataclasses.is_dataclass(option)]
