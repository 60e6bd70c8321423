"""Where a result came from: versions, commit, device, command and configuration, as plain values."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

PACKAGES = ("crosscoder", "torch", "triton", "transformers", "tokenizers", "datasets", "safetensors", "numpy")


def describe_run(config: Any = None, *, device: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Everything a reader needs to run it again; only `started` differs between two identical runs.

    `device`: further facts of the machine, such as what its operators run on.
    """
    return {
        "config": config,
        "command": [_program(Path(sys.argv[0])), *sys.argv[1:]],
        "device": {**_device(), **(device or {})},
        "git_commit": _git_commit(),
        "python": platform.python_version(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "versions": {name: version for name in PACKAGES if (version := _version(name))},
    }


def _program(path: Path) -> str:
    """What one types: the package's name where it is run as a module."""
    return path.parent.name if path.name == "__main__.py" else path.name


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git_commit() -> str | None:
    describe = ["git", "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+changes"]
    here = Path(__file__).parent
    try:
        done = subprocess.run(describe, cwd=here, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _device() -> dict[str, Any]:
    import torch

    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if "model name" in line]
        cpu = names[0] if names else cpu
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {"cpu": cpu, "cpu_threads": torch.get_num_threads(), "gpus": gpus, "system": platform.system()}
