"""Stages that studies share: their folder, their clock, and running cells that are not yet done."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from crosscoder.data.tokens import TokenBlocks
from crosscoder.foundation.artifact import write_json
from crosscoder.foundation.config import to_mapping
from crosscoder.foundation.console import say
from crosscoder.studies.cells import Cell, Stores, run_cell
from crosscoder.studies.joint import JointCell, run_joint
from crosscoder.studies.workers import run_jobs

READINGS = "readings"  # folder of what the verdict reads
COMPUTING = ("data", "dictionary", "training", "measure", "verdict", "studies")  # rooms whose code makes numbers


class Clock:
    """Seconds of each stage, said aloud as they pass."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, stage: str) -> None:
        """End a stage."""
        now = time.perf_counter()
        self.seconds[stage] = round(now - self._last, 1)
        say(f"{stage}: {self.seconds[stage]:.0f} s")
        self._last = now


def study_folder(config: Any, prefix: str, root: Path) -> Path:
    """`root/<prefix>-<hash>`: other settings, or another version of the code that computes, is another folder."""
    digest = hashlib.sha256(json.dumps(to_mapping(config), sort_keys=True).encode())
    for path in computing_sources():
        digest.update(path.read_bytes())
    return root / f"{prefix}-{digest.hexdigest()[:10]}"


def computing_sources() -> list[Path]:
    """Every source file of the rooms that compute, and of the kernels, those in C too.

    What names, keeps or shows numbers is left out, so that a report can be reworded without training again.
    """
    package = Path(__file__).parents[1]
    kernels = package.parent / "triton_kernels"
    homes = [kernels, *(package / name for name in COMPUTING)]
    return sorted(path for home in homes for kind in ("*.py", "*.c", "*.h") for path in home.rglob(kind))


def save_splice_ids(held_out: TokenBlocks, folder: Path, n_blocks: int) -> Path | None:
    """A file of `n_blocks` held-out blocks, evenly drawn, for spliced evaluation; None if there are to be none."""
    from safetensors.torch import save_file

    if n_blocks == 0:
        return None
    path = folder / "splice_ids.safetensors"
    stride = max(1, len(held_out) // n_blocks)
    save_file({"ids": held_out[::stride][:n_blocks].contiguous()}, path)
    return path


def _run_and_keep(cell: Cell, stores: Stores, path: Path, device: str, save_to: Path | None, readings_to: Path) -> None:
    write_json(path, run_cell(cell, stores, device=device, save_to=save_to, readings_to=readings_to))


def run_cells(
    cells: Sequence[Cell],
    wanted: Mapping[str, Path],
    stores: Mapping[tuple[str, int, str], Stores],
    folder: Path,
    device: str,
    workers: int,
) -> None:
    """Run every cell whose result is not in its file yet; spliced evaluation and saving are for main cells only."""
    (folder / "cells").mkdir(exist_ok=True)
    jobs: dict[str, Callable[[], Any]] = {}
    for cell in cells:
        if wanted[cell.name].is_file():
            continue
        state = "trained" if cell.state == "shuffled" else cell.state
        here = stores[cell.subject, cell.training_seed, state]
        if cell.role != "main" or cell.state == "shuffled":
            here = replace(here, subject=None, held_out_ids=None)
        save_to = folder / "dictionaries" if cell.role == "main" and cell.state == "trained" else None
        jobs[cell.name] = partial(_run_and_keep, cell, here, wanted[cell.name], device, save_to, folder / READINGS)
    if jobs:
        n_dictionaries = sum(len(cell.seeds) for cell in cells if cell.name in jobs)
        say(f"training {n_dictionaries} dictionaries in {len(jobs)} cells")
        run_jobs(jobs, workers=workers, device=device, label="dictionaries")


def _run_joint_and_keep(cell: JointCell, stores: tuple[Stores, Stores], path: Path, device: str) -> None:
    write_json(path, run_joint(cell, stores, device=device))


def run_joints(
    cells: Sequence[JointCell],
    wanted: Mapping[str, Path],
    stores: Mapping[tuple[str, int, str], Stores],
    device: str,
    workers: int,
) -> None:
    """Run every crosscoder over two subjects whose result is not in its file yet."""
    jobs = {
        cell.name: partial(
            _run_joint_and_keep,
            cell,
            (stores[*cell.first, cell.state], stores[*cell.second, cell.state]),
            wanted[cell.name],
            device,
        )
        for cell in cells
        if not wanted[cell.name].is_file()
    }
    if jobs:
        say(f"training crosscoders over two subjects: {', '.join(jobs)}")
        run_jobs(jobs, workers=workers, device=device, label="joint crosscoders")
