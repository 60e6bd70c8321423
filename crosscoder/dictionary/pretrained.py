"""Dictionaries on disk: `config.json` and `model.safetensors`, under a manifest."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from crosscoder.dictionary.config import DictionaryConfig
from crosscoder.foundation.artifact import (
    DamagedArtifactError,
    committed_directory,
    read_json,
    verify_directory,
    write_json,
)
from crosscoder.foundation.config import from_mapping, to_mapping

if TYPE_CHECKING:
    from crosscoder.dictionary.dictionary import Dictionary

SCHEMA = "crosscoder.dictionary/1"
WEIGHTS = "model.safetensors"
CONFIG = "config.json"
DTYPES = ("F64", "F32", "F16", "BF16")


def save_dictionary(dictionary: Dictionary, folder: str | Path) -> None:
    """Write `dictionary` to `folder`, replacing an older artifact there, whole or not at all."""
    with committed_directory(folder, schema=SCHEMA) as temporary:
        write_dictionary(dictionary, temporary)


def write_dictionary(dictionary: Dictionary, folder: Path) -> None:
    """Write config and weights as plain files into `folder`, which the caller commits."""
    config = {"class": type(dictionary).__name__, "settings": to_mapping(dictionary.config)}
    write_json(folder / CONFIG, config)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in dictionary.state_dict().items()}
    save_file(tensors, folder / WEIGHTS)


def read_config(folder: str | Path) -> tuple[str, DictionaryConfig]:
    """Class name and settings of the dictionary in `folder`."""
    path = Path(folder) / CONFIG
    config = read_json(path)
    if not isinstance(config, dict) or not isinstance(config.get("class"), str):
        raise DamagedArtifactError(f"{path} does not name a dictionary class")
    return config["class"], from_mapping(DictionaryConfig, config.get("settings"), where=str(path))


def load_dictionary(folder: str | Path, classes: Mapping[str, type[Dictionary]], *, verify: bool = True) -> Any:
    """The dictionary saved in `folder`, one of `classes`, in evaluation mode.

    Raises:
        FileNotFoundError: there is no dictionary in `folder`.
        DamagedArtifactError: a file fails its check, or a tensor is missing, misshapen or not finite.
        ValueError: the folder holds another class of dictionary.
    """
    folder = Path(folder)
    if verify:
        verify_directory(folder, schema=SCHEMA, required=(CONFIG, WEIGHTS))
    name, config = read_config(folder)
    if name not in classes:
        raise ValueError(f"{folder} holds a {name}, not a {' or '.join(sorted(classes))}; load it as a {name}")
    _check_header(folder / WEIGHTS, classes[name].tensor_shapes(config))
    dictionary = classes[name](**config.settings())
    dictionary.load_state_dict(_read_tensors(folder / WEIGHTS))
    return dictionary.eval()


def _check_header(path: Path, expected: dict[str, tuple[int, ...]]) -> None:
    """Compare the file's own table with the config's before anything is allocated.

    Opening checks the table against the file's size, so a shape that passes is one the file really holds.
    """
    try:
        with safe_open(path, framework="pt") as stream:
            slices = {name: stream.get_slice(name) for name in stream.keys()}  # noqa: SIM118
            found = {name: tuple(part.get_shape()) for name, part in slices.items()}
            dtypes = {name: part.get_dtype() for name, part in slices.items()}
    except SafetensorError as error:
        raise DamagedArtifactError(f"{path} is not a safetensors file ({error})") from error
    if found != expected:
        differing = sorted(n for n in found.keys() | expected.keys() if found.get(n) != expected.get(n))
        details = "; ".join(f"{n}: file {found.get(n)}, config {expected.get(n)}" for n in differing)
        raise DamagedArtifactError(f"{path} does not hold the tensors its config describes: {details}")
    wrong = [f"{name} is {dtype}" for name, dtype in dtypes.items() if dtype not in DTYPES]
    if wrong:
        raise DamagedArtifactError(f"{path}: {', '.join(wrong)}; expected one of {', '.join(DTYPES)}")


def _read_tensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        with safe_open(path, framework="pt") as stream:
            tensors = {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise DamagedArtifactError(f"{path} is not a safetensors file ({error})") from error
    for name, tensor in tensors.items():
        # An untrained BatchTopK threshold is nan by definition; weights never are.
        if name != "threshold" and not bool(torch.isfinite(tensor).all()):
            raise DamagedArtifactError(f"{path}: {name} holds values that are not finite")
    return tensors
