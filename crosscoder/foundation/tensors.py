"""Tensors in files: those that a manifest lists, written and read a part at a time against what they should be, and
those of a file that carries the sha256 of its own content."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from crosscoder.foundation.artifact import SEAL, replace_file
from crosscoder.foundation.damage import MEND, DamagedArtifactError, reading

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
NAMES = {
    torch.int64: "I64", torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"
}  # fmt: skip
"""What safetensors calls the dtypes that are written, in the order in which they lie in its files."""
Pieces = Sequence[tuple[slice, ...]]
"""Which parts of a tensor are read, one after the other; one without slices is all of it."""
WHOLE: Pieces = ((),)


class Streamed(NamedTuple):
    """A tensor whose numbers come one block after the other, so that nobody has to hold all of them."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    blocks: Iterable[Tensor]


def write_tensors(tensors: Mapping[str, Tensor | Streamed], path: Path) -> None:
    """The file that `save_file` of safetensors writes, to the byte, without holding more than a block of it.

    Raises:
        ValueError: a tensor came with more or fewer numbers than its shape has; the file is none.
    """
    table, begin = dict[str, Any](), 0
    for name in in_order(tensors):
        one = tensors[name]
        end = begin + math.prod(one.shape) * one.dtype.itemsize
        table[name] = {"dtype": NAMES[one.dtype], "shape": list(one.shape), "data_offsets": [begin, end]}
        begin = end
    header = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    header += b" " * (-len(header) % 8)
    with path.open("wb") as stream:
        stream.write(len(header).to_bytes(8, "little") + header)
        for name in in_order(tensors):
            for block in blocks_of(tensors[name]):
                stream.write(bytes_of(block.detach().cpu()))
            expected = 8 + len(header) + table[name]["data_offsets"][1]
            if stream.tell() != expected:
                raise ValueError(f"{path}: {name} came with {stream.tell() - expected:+} bytes; nothing is kept of it")


def pass_on(tensors: Mapping[str, Tensor | Streamed]) -> None:
    """What `write_tensors` asks of ranks that only give their parts to the one that writes."""
    for name in in_order(tensors):
        for _ in blocks_of(tensors[name]):
            pass


def in_order(tensors: Mapping[str, Tensor | Streamed]) -> list[str]:
    """Names in the order in which their tensors lie in a file, and come from other ranks."""
    return sorted(tensors, key=lambda name: ([*NAMES].index(tensors[name].dtype), name))


def blocks_of(tensor: Tensor | Streamed) -> Iterable[Tensor]:
    """Its numbers, one block after the other."""
    return tensor.blocks if isinstance(tensor, Streamed) else (tensor,)


def bytes_of(tensor: Tensor) -> memoryview:
    """The numbers of a tensor on the CPU, in their order."""
    flat = tensor.reshape(-1)
    flat = flat if flat.stride(0) == 1 else torch.cat([flat])  # one number may have any stride
    return flat.view(torch.uint8).numpy().data


def table_of(stream: Any) -> dict[str, Tensor]:
    """Shape and dtype of every tensor of an open file, as tensors without numbers."""
    dtypes = {name: dtype for dtype, name in NAMES.items()}
    parts = {name: stream.get_slice(name) for name in stream.keys()}  # noqa: SIM118
    return {n: torch.empty(one.get_shape(), dtype=dtypes[one.get_dtype()], device="meta") for n, one in parts.items()}


def read_part(stream: Any, name: str, pieces: Pieces) -> Tensor:
    """Parts of a tensor of an open file, joined along the first axis."""
    found = [stream.get_slice(name)[piece] if piece else stream.get_tensor(name) for piece in pieces]
    return found[0] if len(found) == 1 else torch.cat(found)


def read_tensors(
    path: Path, expected: dict[str, tuple[int, ...]], pieces: Callable[[str], Pieces] = lambda _: WHOLE
) -> dict[str, Tensor]:
    """The file's tensors, or some pieces of each, after its own table was compared with what is expected.

    Opening checks the table against the file's size, so a shape that passes is one the file really holds.
    """
    try:
        with safe_open(path, framework="pt") as stream:
            parts = {name: stream.get_slice(name) for name in stream.keys()}  # noqa: SIM118
            found = {name: tuple(part.get_shape()) for name, part in parts.items()}
            if differing := sorted(n for n in found.keys() | expected.keys() if found.get(n) != expected.get(n)):
                details = "; ".join(f"{n}: file {found.get(n)}, config {expected.get(n)}" for n in differing)
                raise DamagedArtifactError(f"{path} does not hold the tensors its config describes: {details}")
            tensors = {name: read_part(stream, name, pieces(name)) for name in parts}
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
        digest.update(bytes_of(tensor))
    return digest.hexdigest()
