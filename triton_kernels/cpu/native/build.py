"""The C sources beside this file, compiled for this machine at first use and kept for the next process.

A compiler is what Triton and `torch.compile` ask for as well. Where there is none, or it fails, the operators run on
stock torch operators, slower and with sums in another order, and one warning says so. What is kept is in `kept`.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import re
import shlex
import shutil
import subprocess
import warnings
from pathlib import Path
from typing import NamedTuple

from triton_kernels.cpu.native import kept

FOLDER = Path(__file__).parent
COMPILERS = ("gcc", "clang", "cc")
FLAGS = ("-O3", "-march=native", "-std=gnu11", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-shared", "-fPIC")
TIMEOUT_S = 120


@functools.cache
def library() -> ctypes.CDLL | None:
    """The kernels; None, with a warning, where they cannot be had."""
    try:
        return compiled(compiler())
    except (OSError, subprocess.SubprocessError) as error:
        said = " ".join(str(getattr(error, "stderr", None) or error).split())
        warnings.warn(
            f"the C kernels are not available ({said[:300]}), so CPU operators run on stock torch operators, "
            "1.4 to 2 times slower a training step; install gcc, or name a C compiler in the variable CC",
            RuntimeWarning,
            stacklevel=2,
        )
        return None


class Parameter(NamedTuple):
    name: str
    kind: str
    is_pointer: bool
    is_const: bool


@functools.cache
def declarations() -> dict[str, tuple[Parameter, ...]]:
    """The parameters of every function of the sources that is not static."""
    found = {}
    for path in sorted(FOLDER.glob("*.c")):
        for name, inside in re.findall(r"^void (\w+)\(([^)]*)\)", path.read_text(), re.MULTILINE):
            parts = [re.fullmatch(r"(const )?(\w+) (\*?)(\w+)", " ".join(one.split())) for one in inside.split(",")]
            found[name] = tuple(Parameter(p[4], p[2], bool(p[3]), bool(p[1])) for p in parts if p)
    return found


def form() -> str:
    """What the CPU operators run on here, in words."""
    return "stock torch operators" if library() is None else f"C, {compiler_version(compiler())}"


def compiler_version(command: list[str]) -> str:
    """The first line that the compiler says about itself."""
    return _said([*command, "--version"]).partition("\n")[0].strip()


def _said(command: list[str]) -> str:
    """What a command writes, of whatever encoding."""
    done = subprocess.run(
        command,
        check=True,
        capture_output=True,
        stdin=subprocess.DEVNULL,
        encoding="utf-8",
        errors="replace",
        timeout=TIMEOUT_S,
    )
    return done.stdout


def compiler() -> list[str]:
    """The C compiler's command: `CC` if that is set, else the first of `COMPILERS` on the path."""
    if given := os.environ.get("CC"):
        try:
            command = shlex.split(given)
        except ValueError as error:  # such as a quotation mark that nothing closes
            raise OSError(f"CC is {given!r}, which is no command: {error}") from error
        if not command:
            raise OSError(f"CC is {given!r}, which names no compiler; unset it or name one")
        return command
    for name in COMPILERS:
        found = shutil.which(name)
        if found:
            return [found]
    raise FileNotFoundError(f"none of {', '.join(COMPILERS)} is on the path")


def compiled(command: list[str]) -> ctypes.CDLL:
    """The library of these sources for this machine; compiled now if none that is whole and ours is kept."""

    def build(target: Path) -> None:
        sources = [str(path) for path in sorted(FOLDER.glob("*.c"))]
        _said([*command, *FLAGS, *sources, "-lm", "-o", str(target)])

    return kept.library(fingerprint(command), build)


def fingerprint(command: list[str]) -> str:
    """What the machine code depends on: sources, compiler, flags, and the CPU, for folders that machines share."""
    digest = hashlib.sha256()
    for path in sorted(FOLDER.glob("*.[ch]")):
        digest.update(path.read_bytes())
    digest.update("\0".join([compiler_version(command), *command, *FLAGS, platform.machine()]).encode())
    cpu = Path("/proc/cpuinfo")
    lines = cpu.read_text().splitlines() if cpu.exists() else [platform.processor()]
    digest.update("".join(sorted({line for line in lines if line.startswith(("model name", "flags"))})).encode())
    return digest.hexdigest()[:16]
