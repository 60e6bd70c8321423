"""Folders of other libraries, read with distrust: settings asked for by name, tensors that are what they claim.

A setting that nobody asks for and that is not off is refused, for it may change the function. Sizes are taken from the
files' own tables, which are checked against their length before anything is allocated.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from crosscoder.foundation.artifact import DamagedArtifactError, file_sha256, read_json
from crosscoder.foundation.console import say

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
COMPILED = "_orig_mod."
"""What `torch.compile` puts before the names of tensors."""
REQUIRED: Any = object()


class Settings:
    """The settings of a file, asked for one by one; `finish` refuses what is left."""

    def __init__(self, values: Any, where: Path | str) -> None:
        if not isinstance(values, dict):
            raise DamagedArtifactError(f"{where} holds a {type(values).__name__}; expected a table of settings")
        self._values, self.where, self._read = values, where, set[str]()

    def __contains__(self, name: str) -> bool:
        return name in self._values

    def take(self, name: str, kind: type | tuple[type, ...], default: Any = REQUIRED) -> Any:
        """A setting; a ValueError where it is missing without a default, or of another type (None is the default)."""
        self._read.add(name)
        value = self._values.get(name)
        if value is None and default is not REQUIRED:
            return default
        kinds = kind if isinstance(kind, tuple) else (kind,)
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            expected = " or ".join(one.__name__ for one in kinds)
            seen = "is missing" if name not in self._values else f"is {value!r:.80}"
            raise ValueError(f"{self.where}: {name} {seen}; expected {expected}")
        return value

    def table(self, name: str) -> Settings:
        """A table of settings in this one; empty where it is missing."""
        return Settings(self.take(name, dict, {}), f"{self.where}: {name}")

    def count(self, name: str, default: Any = REQUIRED) -> Any:
        """A whole number of at least 1."""
        value = self.take(name, int, default)
        if value is not default and value < 1:
            raise ValueError(f"{self.where}: {name} is {value}; expected at least 1")
        return value

    def require(self, name: str, *allowed: Any, default: Any, why: str) -> Any:
        """A setting of which only some values are of the functions that exist here."""
        self._read.add(name)
        value = self._values.get(name, default)
        if not any(value == one and type(value) is type(one) for one in allowed):
            raise ValueError(f"{self.where}: {name} is {value!r:.80}: {why}. It is not imported")
        return value

    def ignore(self, *names: str) -> None:
        """Settings that say how something was trained, and nothing of what it computes."""
        self._read.update(names)

    def finish(self) -> None:
        """Refuse settings that nobody asked for, unless they are off."""
        left = {name: value for name, value in self._values.items() if name not in self._read and value}
        if left:
            seen = ", ".join(f"{name} = {value!r:.60}" for name, value in sorted(left.items()))
            raise ValueError(
                f"{self.where} has settings that are not known here, and may change what the dictionary computes: "
                f"{seen:.400}. It is not imported; if they do not, delete them from a copy of the file"
            )


class Tensors:
    """The tensors of a file, taken one by one as float32; `finish` refuses what is left."""

    def __init__(self, path: Path, shapes: Mapping[str, tuple[int, ...]], get: Any) -> None:
        self.path, self.shapes, self._get = path, dict(shapes), get
        self._taken, self._dtypes = set[str](), dict[torch.dtype, int]()

    def __contains__(self, name: str) -> bool:
        return name in self.shapes

    def shape(self, name: str, n_axes: int) -> tuple[int, ...]:
        """The shape of a tensor that has so many axes, none of them empty."""
        found = self.shapes.get(name)
        if found is None or len(found) != n_axes or 0 in found:
            seen = "missing" if found is None else f"of shape {list(found)}"
            held = ", ".join(sorted(self.shapes))
            raise DamagedArtifactError(f"{self.path}: {name} is {seen}; expected {n_axes} axes (it holds {held:.200})")
        return found

    def take(self, name: str, *shape: int, finite: bool = True) -> Tensor:
        """A tensor as float32, of this shape and finite unless told otherwise."""
        if self.shapes.get(name) != shape:
            found = self.shapes.get(name)
            seen = "missing" if found is None else f"of shape {list(found)}"
            raise DamagedArtifactError(f"{self.path}: {name} is {seen}; expected {list(shape)}")
        self._taken.add(name)
        tensor = self._get(name)
        if tensor.dtype not in FLOATS:
            raise DamagedArtifactError(f"{self.path}: {name} is {tensor.dtype}; expected one of {FLOATS}")
        self._dtypes[tensor.dtype] = self._dtypes.get(tensor.dtype, 0) + 1
        tensor = tensor.to(torch.float32)
        if finite and tensor.numel() and not bool(torch.isfinite(torch.stack(torch.aminmax(tensor))).all()):
            raise DamagedArtifactError(f"{self.path}: {name} holds values that are not finite")
        return tensor

    def number(self, name: str) -> float:
        if self.shapes.get(name) not in ((), (1,)):
            raise DamagedArtifactError(f"{self.path}: {name} is of shape {self.shapes.get(name)}; expected one number")
        self._taken.add(name)
        return float(self._get(name))

    def ignore(self, *names: str) -> None:
        """Tensors that do not take part in the function."""
        self._taken.update(names)

    def finish(self) -> None:
        """Refuse tensors that nobody took, and say which were not float32."""
        if left := sorted(self.shapes.keys() - self._taken):
            raise ValueError(
                f"{self.path} holds tensors that are not known here, and may be part of what the dictionary computes: "
                f"{', '.join(left):.300}. It is not imported"
            )
        for dtype, count in self._dtypes.items():
            if dtype != torch.float32:
                name = str(dtype).removeprefix("torch.")
                done = "rounded to" if dtype == torch.float64 else "taken as"
                say(f"note: {count} tensors of {self.path.name} are {name}; they are {done} float32")


@contextlib.contextmanager
def open_tensors(path: Path, *, allow_pickle: bool = False) -> Generator[Tensors]:
    """The tensors of a safetensors file, or, if allowed, of a pickled state dict; what is left untaken is refused."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; give the folder that holds it, whole")
    if path.suffix in (".pt", ".pth", ".bin"):
        held = _unpickled(path, allow_pickle=allow_pickle)
        found = Tensors(path, {name: tuple(tensor.shape) for name, tensor in held.items()}, held.__getitem__)
        yield found
    else:
        try:
            with safe_open(path, framework="pt") as stream:
                names = list(stream.keys())
                real = {name.removeprefix(COMPILED): name for name in names}
                if len(real) < len(names):
                    raise DamagedArtifactError(f"{path} holds tensors with and without {COMPILED!r} of the same name")
                shapes = {name: tuple(stream.get_slice(own).get_shape()) for name, own in real.items()}
                found = Tensors(path, shapes, lambda name: stream.get_tensor(real[name]))
                yield found
        except SafetensorError as error:
            raise DamagedArtifactError(f"{path} is not a safetensors file ({error})") from error
    found.finish()


def _unpickled(path: Path, *, allow_pickle: bool) -> dict[str, Tensor]:
    """The state dict of a .pt file, by torch's reader of weights, which runs nothing that the file asks for."""
    if not allow_pickle:
        target = path.with_suffix(".safetensors").name
        raise ValueError(
            f"{path} is a pickle, which is a program; pickles are not read unasked. --allow-pickle reads it with "
            "torch.load(weights_only=True), which makes tensors and nothing else; or write it again yourself where you "
            f"trust it: safetensors.torch.save_file(torch.load({path.name!r}, weights_only=True), {target!r})"
        )
    try:
        held = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # UnpicklingError, EOFError, RuntimeError and others
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DamagedArtifactError(f"{path} is not a file of weights alone ({reason:.200})") from error
    if not isinstance(held, dict) or not all(isinstance(value, Tensor) for value in held.values()):
        raise ValueError(f"{path} holds something else than tensors by name; save the state dict alone")
    size = path.stat().st_size
    for name, tensor in held.items():
        if tensor.is_meta or tensor.layout != torch.strided or tensor.numel() * tensor.element_size() > size:
            raise DamagedArtifactError(f"{path}: {name} claims shape {list(tensor.shape)}; the file has {size} bytes")
    return {str(name).removeprefix(COMPILED): tensor for name, tensor in held.items()}


def read_settings(path: Path) -> Settings:
    """The settings in a JSON file; a FileNotFoundError where there is none."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; give the folder that holds it, whole")
    return Settings(read_json(path), path)


def hash_files(paths: list[Path]) -> str:
    """One sha256 of several files: that of their names and hashes in order."""
    if len(paths) == 1:
        return file_sha256(paths[0])
    listed = "".join(f"{path.name} {file_sha256(path)}\n" for path in paths)
    return hashlib.sha256(listed.encode()).hexdigest()
