"""Tensors in files: those that a manifest lists, read against what they should be, and those of a file that carries
the sha256 of its own content."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from crosscoder.foundation.artifact import SEAL, replace_file
from crosscoder.foundation.damage import MEND, DamagedArtifactError, reading

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def read_tensors(path: Path, expected: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """The file's tensors, after its own table was compared with what is expected.

    Opening checks the table against the file's size, so a shape that passes is one the file really holds.
    """
    try:
        with safe_open(path, framework="pt") as stream:
            parts = {name: stream.get_slice(name) for name in stream.keys()}  # noqa: SIM118
            found = {name: tuple(part.get_shape()) for name, part in parts.items()}
            if differing := sorted(n for n in found.keys() | expected.keys() if found.get(n) != expected.get(n)):
                details = "; ".join(f"{n}: file {found.get(n)}, config {expected.get(n)}" for n in differing)
                raise DamagedArtifactError(f"{path} does not hold the tensors its config describes: {details}")
            tensors = {name: stream.get_tensor(name) for name in parts}
    except SafetensorError as error:
        raise DamagedArtifactError(f"{path} is not a safetensors file ({error})") from error
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPES:
            raise DamagedArtifactError(f"{path}: {name} is {tensor.dtype}; expected one of {DTYPES}")
        # An untrained BatchTopK threshold is nan by definition; weights never are.
        if name != "threshold" and not bool(torch.isfinite(tensor).all()):
            raise DamagedArtifactError(f"{path}: {name} holds values that are not finite")
    return tensors


def save_tensors(tensors: dict[str, Tensor], path: str | Path) -> None:
    """Write tensors, sealed, so that a reader sees the old file or the new one."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    replace_file(path, save(tensors, {SEAL: _seal_of(tensors)}))


def load_tensors(path: str | Path, *, mend: str = MEND) -> dict[str, Tensor]:
    with reading(path, mend=mend), safe_open(path, framework="pt") as stream:
        given = (stream.metadata() or {}).get(SEAL)
        tensors = {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118
    if given != (found := _seal_of(tensors)):
        raise DamagedArtifactError(
            f"{path} was changed since it was written, or by a version that sealed nothing: its tensors have the "
            f"{SEAL} {found[:12]}, and it says {str(given)[:12]}; {mend}"
        )
    return tensors


def _seal_of(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode("utf-8", "backslashreplace"))
        flat = tensor.reshape(-1)
        flat = flat if flat.stride(0) == 1 else torch.cat([flat])  # one number may have any stride
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()
