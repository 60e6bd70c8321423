"""What a trainer is given, checked."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import nn

from crosscoder.dictionary import Dictionary

MAX_NAME = 200  # bytes of a dictionary's name: file systems take 255, some for what is written beside it


def checked_dictionaries(dictionaries: Iterable[Dictionary]) -> list[Dictionary]:
    given = [unwrapped(one) for one in ([dictionaries] if isinstance(dictionaries, nn.Module) else dictionaries)]
    if wrong := [type(one).__name__ for one in given if not isinstance(one, Dictionary)]:
        raise ValueError(f"among the dictionaries is a {wrong[0]}; give a list of Crosscoder or LayerwiseSAE")
    if not given or len({id(one) for one in given}) < len(given):
        raise ValueError(f"{len(given)} dictionaries, some given twice or none at all; give each one once")
    return given


def unwrapped(dictionary: Any) -> Any:
    """What `torch.compile` was given, of what it returned; anything else as it is."""
    return getattr(dictionary, "_orig_mod", dictionary)


def checked_names(names: Iterable[str]) -> list[str]:
    """The names, each of which can be a folder's."""
    found = list(names)
    for name in found:
        is_plain = isinstance(name, str) and Path(name).name == name and name not in ("", "..") and "\0" not in name
        if not is_plain or len(os.fsencode(name)) > MAX_NAME:
            raise ValueError(f"{name!r:.80} is no name for a dictionary; give a string that can be a folder's name")
    return found
