"""The files of a dictionary: `config.json` with its form, settings and record, `model.safetensors` with its tensors."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from crosscoder.dictionary.config import DictionaryConfig
from crosscoder.foundation.artifact import (
    MANIFEST,
    DamagedArtifactError,
    inside,
    read_json,
    verify_directory,
    write_json,
)
from crosscoder.foundation.config import from_mapping, to_mapping
from crosscoder.foundation.console import say
from crosscoder.foundation.damage import reading
from crosscoder.foundation.hub import local_folder
from crosscoder.foundation.origin import Reads
from crosscoder.foundation.tensors import bytes_of, read_tensors, write_tensors

SCHEMA = "crosscoder.dictionary/1"
WEIGHTS = "model.safetensors"
CONFIG = "config.json"
FILES = (CONFIG, WEIGHTS)
CONVERT = "What another library wrote becomes one by `crosscoder convert`"
Shapes = Mapping[str, tuple[int, ...]]


class Saved(NamedTuple):
    """What the files of a dictionary hold."""

    form: str
    """The name of its class."""
    config: DictionaryConfig
    tensors: Mapping[str, Any]
    """Read: tensors. To be written: those of all ranks, some of them `Streamed`."""
    reads: Reads | None
    frozen: str


def write_saved(saved: Saved, folder: Path) -> None:
    """Write config and weights as plain files into `folder`, which the caller commits."""
    reads = None if saved.reads is None else to_mapping(saved.reads)
    config = {"class": saved.form, "settings": to_mapping(saved.config), "reads": reads, "frozen": saved.frozen}
    write_json(folder / CONFIG, config)
    write_tensors(saved.tensors, folder / WEIGHTS)


def read_record(where: str | Path) -> tuple[DictionaryConfig, Reads | None]:
    """The settings of a dictionary in a folder or on the Hub, and the record of what it reads, if it keeps one."""
    path = local_folder(where, files=(CONFIG,)) / CONFIG
    if not path.is_file():
        mend = inside(path.parent, WEIGHTS) or CONVERT
        raise FileNotFoundError(f"{where} holds no {CONFIG}: it is no dictionary. {mend}")
    return _described(_config(path), path)


def _config(path: Path) -> dict[str, Any]:
    found = read_json(path)
    if not isinstance(found, dict) or not isinstance(found.get("class"), str):
        raise DamagedArtifactError(f"{path} does not name a dictionary class. {CONVERT}")
    return found


def _described(found: dict[str, Any], path: Path) -> tuple[DictionaryConfig, Reads | None]:
    config, reads = from_mapping(DictionaryConfig, found.get("settings"), where=str(path)), found.get("reads")
    return config, None if reads is None else from_mapping(Reads, reads, where=f"{path}.reads")


def read_saved(folder: Path, where: object, shapes: Callable[[str, DictionaryConfig], Shapes]) -> Saved:
    """The files of a folder, after they were checked; where there is no manifest to check by, that is said.

    where: what the user calls the folder. shapes: the tensors that a form of a config has; it may refuse the form.
    """
    if all((folder / name).is_file() for name in FILES) and not (folder / MANIFEST).is_file():
        say(f"note: {where} has no {MANIFEST}, so nobody can tell whether its files are as they were written")
    elif folder.is_dir() and not (folder / MANIFEST).is_file():
        lacks = f"{where} has no {MANIFEST} and not both of {' and '.join(FILES)}"
        raise FileNotFoundError(f"{lacks}: no dictionary. {inside(folder, WEIGHTS) or CONVERT}")
    else:
        verify_directory(folder, schema=SCHEMA, required=FILES)
    found = _config(folder / CONFIG)
    with reading(folder / CONFIG):
        config, reads = _described(found, folder / CONFIG)
        expected = shapes(form := found["class"], config)
    with reading(folder / WEIGHTS):
        tensors = read_tensors(folder / WEIGHTS, dict(expected))
    if not bool((tensors["input_scale"] > 0).all()):
        raise DamagedArtifactError(f"{folder / WEIGHTS}: input_scale is not positive, and inputs are divided by it")
    return Saved(form, config, tensors, reads, str(found.get("frozen", "none")))


def tensors_sha256(tensors: Mapping[str, Tensor]) -> str:
    """sha256 over names, dtypes, shapes and bytes, whatever file they are in."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(bytes_of(tensor.detach().cpu()))
    return digest.hexdigest()
