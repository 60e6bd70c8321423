"""Specifications of plain values: a function of `(value, path)` that raises, larger ones built from smaller ones."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NoReturn

_KEY = re.compile(r"[A-Za-z][A-Za-z0-9_.-]{0,63}")  # becomes an anchor and a label: no spaces, no markup
MAX_DEPTH = 32
_LARGEST = 1e30  # beyond this, infinite or nonsense; NaN fails the comparison too

Spec = Callable[[Any, str], None]


def fail(path: str, expected: str, seen: Any) -> NoReturn:
    shown = repr(seen)
    shown = shown if len(shown) <= 80 else f"{shown[:77]}..."
    raise ValueError(f"{path}: expected {expected}, got {shown}")


def text(value: Any, path: str) -> None:
    """A string that UTF-8 can hold."""
    if not isinstance(value, str):
        fail(path, "a string", value)
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        fail(path, "a string that UTF-8 can hold", value)


def number(value: Any, path: str) -> None:
    """A finite number; True and False are not numbers."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        fail(path, "a number", value)
    if not abs(value) < _LARGEST:
        fail(path, "a finite number (write null where a quantity is undefined)", value)


def share(value: Any, path: str) -> None:
    """A number from 0 to 1."""
    number(value, path)
    if not -1e-9 <= value <= 1 + 1e-9:
        fail(path, "a share between 0 and 1", value)


def count(value: Any, path: str) -> None:
    """A whole number, 0 or more."""
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < _LARGEST:
        fail(path, "a whole number of 0 or more", value)


def boolean(value: Any, path: str) -> None:
    """True or False."""
    if not isinstance(value, bool):
        fail(path, "true or false", value)


def plain(value: Any, path: str, depth: int = 0) -> None:
    """Any JSON value without NaN, Infinity or absurd nesting."""
    if depth > MAX_DEPTH:
        fail(path, f"at most {MAX_DEPTH} levels", value)
    if isinstance(value, dict):
        for key, item in value.items():
            text(key, f"{path} (key)")
            plain(item, f"{path}.{key}", depth + 1)
    elif isinstance(value, list | tuple):
        for i, item in enumerate(value):
            plain(item, f"{path}[{i}]", depth + 1)
    elif isinstance(value, str):
        text(value, path)
    elif value is not None and not isinstance(value, bool):
        number(value, path)


def optional(spec: Spec) -> Spec:
    """`spec`, or null."""

    def check(value: Any, path: str) -> None:
        if value is not None:
            spec(value, path)

    return check


def either(first: Spec, second: Spec, expected: str) -> Spec:
    """`first` or `second`."""

    def check(value: Any, path: str) -> None:
        for spec in (first, second):
            try:
                spec(value, path)
            except ValueError:
                continue
            return
        fail(path, expected, value)

    return check


def one_of(*options: str) -> Spec:
    """One of these strings."""

    def check(value: Any, path: str) -> None:
        if value not in options:
            fail(path, f"one of {list(options)}", value)

    return check


def list_of(spec: Spec, *, least: int = 0, exactly: int | None = None) -> Spec:
    """A list whose items meet `spec`."""

    def check(value: Any, path: str) -> None:
        if not isinstance(value, list | tuple):
            fail(path, "a list", value)
        if exactly is not None and len(value) != exactly:
            fail(path, f"a list of {exactly}", value)
        if len(value) < least:
            fail(path, f"a list of at least {least}", value)
        for i, item in enumerate(value):
            spec(item, f"{path}[{i}]")

    return check


def keyed_by_name(spec: Spec, *, least: int = 0) -> Spec:
    """A table with free keys (letters, digits, '_', '.', '-'), each holding `spec`."""

    def check(value: Any, path: str) -> None:
        if not isinstance(value, dict):
            fail(path, "a table", value)
        if len(value) < least:
            fail(path, f"a table with at least {least} entries", value)
        for key, item in value.items():
            if not isinstance(key, str) or not _KEY.fullmatch(key):
                fail(path, "keys of letters, digits, '_', '.', '-' that start with a letter", key)
            spec(item, f"{path}.{key}")

    return check


def table(fields: dict[str, Spec], *, may_lack: tuple[str, ...] = (), open_ended: bool = False) -> Spec:
    """A table with exactly these keys, less some of `may_lack`; `open_ended` lets others hold any plain value."""

    def check(value: Any, path: str) -> None:
        if not isinstance(value, dict):
            fail(path, f"a table with {list(fields)}", value)
        missing = [key for key in fields if key not in value and key not in may_lack]
        if missing:
            raise ValueError(f"{path}: expected the key {missing[0]!r}, got only {sorted(map(str, value))}")
        for key, item in value.items():
            if key in fields:
                fields[key](item, f"{path}.{key}")
            elif open_ended:
                plain(item, f"{path}.{key}")
            else:
                raise ValueError(f"{path}: got the unknown key {key!r}, expected only {list(fields)}")

    return check


def seed_range(value: Any, path: str) -> None:
    """`{"mean", "low", "high"}` over dictionary seeds."""
    table({"mean": number, "low": number, "high": number})(value, path)
    if value["low"] > value["high"]:
        fail(path, "low <= high", value)
