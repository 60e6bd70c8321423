"""A study's folder: every stage keeps its result there, so that what is done is not done twice."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from safetensors.torch import save_file

from crosscoder.data.prepared import PreparedTokens
from crosscoder.data.residuals import ResidualHarvester
from crosscoder.data.shards import ActivationShards, write_shards
from crosscoder.data.subject import count_parameters
from crosscoder.data.tokens import TokenBlocks
from crosscoder.foundation.config import to_mapping
from crosscoder.foundation.console import say
from crosscoder.foundation.provenance import describe_run
from crosscoder.results.file import Provenance, Results, read_rows, write_rows
from crosscoder.results.table import LongTable, Row, State
from crosscoder.results.verdict import Verdict
from crosscoder.studies.cells import Cell, Stores, run_cell
from crosscoder.studies.joint import JointCell, run_joint
from crosscoder.studies.presets import Run
from crosscoder.studies.workers import run_jobs
from triton_kernels.cpu.native import build

READINGS = "readings"  # folder of what the verdict reads
AnyCell = Cell | JointCell
COMPUTING = ("data", "dictionary", "training", "measure", "verdict", "studies")  # rooms whose code makes numbers


class StudyFolder:
    """Where a study keeps its stages, where they run, and the seconds that each took."""

    def __init__(self, root: Path, *, device: str = "cpu", workers: int = 1) -> None:
        self.root, self.device, self.workers = root, device, workers
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()
        root.mkdir(parents=True, exist_ok=True)

    def lap(self, stage: str) -> None:
        """End a stage."""
        now = time.perf_counter()
        self.seconds[stage] = round(now - self._last, 1)
        say(f"{stage}: {self.seconds[stage]:.0f} s")
        self._last = now

    def run(self, jobs: Mapping[str, Callable[[], Any]], label: str) -> dict[str, Any]:
        """The result of every job by name."""
        return run_jobs(jobs, workers=self.workers, device=self.device, label=label) if jobs else {}

    def tokens(self, prepare: Callable[[], PreparedTokens]) -> PreparedTokens:
        """The study's text, prepared at the first call."""
        home = self.root / "tokens"
        if not (home / "held_out").is_dir():
            prepare().save(home)
        return PreparedTokens.load(home)

    def splice_ids(self, held_out: TokenBlocks, n_blocks: int) -> Path | None:
        """A file of `n_blocks` held-out blocks, evenly drawn, for spliced evaluation; None if there are to be none."""
        if n_blocks == 0:
            return None
        path = self._activations / "splice_ids.safetensors"
        path.parent.mkdir(exist_ok=True)
        stride = max(1, len(held_out) // n_blocks)
        save_file({"ids": held_out[::stride][:n_blocks].contiguous()}, path)
        return path

    def stores(
        self,
        run: str,
        state: State,
        *,
        subject: Path | str | None = None,
        ids: Path | None = None,
        blocks_path: str | None = None,
    ) -> Stores:
        """Where the activations of one model lie; with `subject` and `ids` it is also read with reconstructions."""
        home = self._activations / f"{run}-{state}"
        return Stores(
            train=home / "train",
            held_out=home / "held_out",
            subject=subject if ids else None,
            held_out_ids=ids if subject else None,
            blocks_path=blocks_path,
        )

    def left(self, cells: Sequence[AnyCell]) -> list[AnyCell]:
        """The cells whose rows are not there yet."""
        return [cell for cell in cells if not self._rows_of(cell).is_file()]

    def run_cells(self, cells: Sequence[AnyCell], stores: Mapping[tuple[str, int, State], Stores]) -> None:
        """Measure every cell that is left and keep its rows; main ones keep dictionaries and readings."""
        (self.root / "cells").mkdir(exist_ok=True)
        jobs = {cell.name: partial(_keep, self._job(cell, stores), self._rows_of(cell)) for cell in self.left(cells)}
        if jobs:
            n_dictionaries = sum(len(cell.seeds) for cell in cells if cell.name in jobs)
            say(f"training {n_dictionaries} dictionaries in {len(jobs)} cells")
            self.run(jobs, "dictionaries")

    def _job(self, cell: AnyCell, stores: Mapping[tuple[str, int, State], Stores]) -> Callable[[], list[Row]]:
        state: State = "trained" if cell.state == "shuffled" else cell.state
        here = [stores[*run, state] for run in runs_of(cell)]
        if isinstance(cell, JointCell):
            return partial(run_joint, cell, (here[0], here[1]), device=self.device)
        main = cell.role == "main" and cell.state != "shuffled"
        store = here[0] if main else replace(here[0], subject=None, held_out_ids=None)
        save_to = self.root / "dictionaries" if main and cell.state == "trained" else None
        return partial(run_cell, cell, store, device=self.device, save_to=save_to, readings_to=self.root / READINGS)

    def rows(self, cells: Sequence[AnyCell]) -> list[Row]:
        """The rows of all cells, in their order."""
        return [row for cell in cells for row in read_rows(self._rows_of(cell))]

    @property
    def _activations(self) -> Path:
        return self.root / "activations"

    def _rows_of(self, cell: AnyCell) -> Path:
        return self.root / "cells" / f"{cell.name}.json"

    def results(
        self,
        rows: Sequence[Row],
        verdict: Verdict | None,
        *,
        config: Any,
        kind: Literal["aspect_ratio", "subject_study", "synthetic"],
        preset: str,
        text: str,
        tokens_fingerprint: str = "",
    ) -> Results:
        """Everything measured, what is said of it, and where it came from."""
        run = describe_run(to_mapping(config), device={"cpu_kernels": build.form()})
        origin = {"kind": kind, "preset": preset, "text": text, "tokens_fingerprint": tokens_fingerprint}
        return Results(LongTable(tuple(rows)), verdict, Provenance(**run, **origin, seconds=self.seconds))


def _keep(measure: Callable[[], list[Row]], path: Path) -> None:
    write_rows(path, measure())


def runs_of(cell: AnyCell) -> tuple[Run, ...]:
    """The training runs that a cell reads."""
    return (cell.first, cell.second) if isinstance(cell, JointCell) else ((cell.subject, cell.training_seed),)


def harvest_into(
    stores: Stores,
    harvester: ResidualHarvester,
    tokens: PreparedTokens,
    most: tuple[int, int],
    *,
    metadata: dict[str, str] | None = None,
    quiet: bool = True,
) -> None:
    """Write a model's activations where they are not there yet, at most so many tokens for training and held out."""
    splits = (stores.train, tokens.train), (stores.held_out, tokens.held_out)
    for (home, blocks), n_tokens in zip(splits, most, strict=True):
        if not home.is_dir():
            home.parent.mkdir(parents=True, exist_ok=True)
            write_shards(harvester, blocks, home, max_tokens=n_tokens, metadata=metadata, quiet=quiet)
        ActivationShards.load(home)  # hashes are checked once here, and not again by every cell


def drop_activations(stores: Iterable[Stores]) -> None:
    """Free the disk of activations that have been read."""
    for one in stores:
        shutil.rmtree(one.train.parent, ignore_errors=True)


def parameter_counts(model: Any) -> dict[str, int]:
    """A model's parameters by what they are for."""
    counts = count_parameters(model)
    return {
        "parameters_non_embedding": counts.non_embedding_matrices,
        "parameters_embedding": counts.embedding,
        "parameters_norms": counts.norms,
    }


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
