"""A study's folder: every stage keeps its result there, so that what is done is not done twice."""

from __future__ import annotations

import contextlib
import functools
import gc
import hashlib
import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import save_file

from crosscoder.data.prepare import prepare_tokens
from crosscoder.data.residuals import ResidualHarvester
from crosscoder.data.shards import ActivationShards, write_shards
from crosscoder.data.subject import count_parameters
from crosscoder.data.tokens import PreparedTokens, TokenBlocks
from crosscoder.foundation.config import to_mapping
from crosscoder.foundation.console import Progress, say
from crosscoder.foundation.provenance import describe_run
from crosscoder.results.file import Provenance, Results, read_rows, write_rows
from crosscoder.results.table import LongTable, Row, State
from crosscoder.results.verdict import Verdict
from crosscoder.studies.stores import Stores
from triton_kernels import cpu_form

StoresOf = Mapping[tuple[str, int, State], Stores]
"""By shape, position of its training seed, and state."""


class Measured(Protocol):
    """What is measured on one model's activations and keeps its rows in a file: a cell, or a room."""

    @property
    def n_dictionaries(self) -> int:
        """How many are trained."""
        ...

    @property
    def name(self) -> str:
        """A file name of its own."""
        ...

    @property
    def read(self) -> tuple[str, int, State]:
        """The activations that it reads."""
        ...

    def measure(self, store: Stores, folder: Path, *, device: str = "cpu") -> list[Row]:
        """Its rows."""
        ...


STATES: tuple[State, ...] = ("trained", "untrained")
"""Of subjects that are harvested."""
COMPUTING = ("data", "dictionary", "training", "measure", "verdict", "studies")  # rooms whose code makes numbers


class StudyFolder:
    """Where a study keeps its stages, where they run, and the seconds that each took."""

    def __init__(self, root: Path, *, device: str = "cpu", workers: int = 1) -> None:
        self.root, self.device, self.workers = root, device, workers
        self._activations = root / "activations"
        self._splice_ids = self._activations / "splice_ids.safetensors"
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
        """The result of every job by name, in the order of `jobs`.

        On a CPU each job runs in a process of its own kind with one thread, also when `workers` is 1: the number of
        threads decides the order of sums, and so the last bits. The processes are started once and serve every stage.
        On a GPU jobs run one after the other right here.

        Raises:
            RuntimeError: a job failed; names it, with its error as the cause.
        """
        if not jobs:
            return {}
        results: dict[str, Any] = {}
        with Progress(label, len(jobs), unit="job") as progress:
            if self.device != "cpu":
                for name, job in jobs.items():
                    results[name] = job()
                    progress.advance()
                return results
            name = ""
            try:
                futures = {self._processes.submit(job): name for name, job in jobs.items()}
                for future in as_completed(futures):
                    name = futures[future]
                    results[name] = future.result()
                    progress.advance()
            except BaseException as error:
                self._leash.close()  # what runs now ends now
                self._processes.shutdown(wait=False, cancel_futures=True)
                del self._processes
                if isinstance(error, Exception):
                    say(f"{label}: {name} failed")
                    raise RuntimeError(f"{name} failed: {error}") from error
                raise
        return {name: results[name] for name in jobs}

    @functools.cached_property
    def _processes(self) -> ProcessPoolExecutor:
        context = get_context("spawn")
        watched, self._leash = context.Pipe(duplex=False)
        return ProcessPoolExecutor(self.workers, context, _begin_process, (watched,))

    def tokens(self, text: str, **settings: Any) -> PreparedTokens:
        """The study's text, prepared at the first call."""
        home = self.root / "tokens"
        if not (home / "held_out").is_dir():
            prepare_tokens(text, **settings, folder=home, quiet=False)
        return PreparedTokens.load(home)

    def stores(self, run: str, state: State, *, spliced: Path | str | None = None, **how: Any) -> Stores:
        """Where the activations of one model lie; `spliced` is the model if it is also read with reconstructions.

        `how` it is loaded and read are fields of `Stores`.
        """
        home = self._activations / f"{run}-{state}"
        ids = None if spliced is None else self._splice_ids
        here = Stores(home / "train", home / "held_out", subject=spliced, held_out_ids=ids, **how)
        return replace(here, tokens=self.root / "tokens")

    def draw_splice_ids(self, held_out: TokenBlocks, n_blocks: int) -> None:
        """Keep `n_blocks` held-out blocks, evenly drawn, for spliced evaluation."""
        self._splice_ids.parent.mkdir(exist_ok=True)
        stride = max(1, len(held_out) // max(1, n_blocks))
        blocks = torch.arange(len(held_out))[::stride][:n_blocks].contiguous()
        save_file({"ids": held_out[blocks].contiguous(), "blocks": blocks}, self._splice_ids)

    def left(self, cells: Sequence[Measured]) -> list[Measured]:
        """The cells whose rows are not there yet."""
        return [cell for cell in cells if not self._rows_of(cell).is_file()]

    def run_cells(
        self, cells: Sequence[Measured], harvest: Callable[[], StoresOf], *, keep_activations: bool = False
    ) -> None:
        """Measure every cell that is left on what `harvest` stores; main ones keep dictionaries and readings."""
        if left := self.left(cells):
            stores = harvest()
            self.lap("activations")
            say(f"training {sum(cell.n_dictionaries for cell in left)} dictionaries in {len(left)} cells")
            jobs = {self._rows_of(cell): self._job(cell, stores[cell.read]) for cell in left}
            self.measure(jobs, "dictionaries")
            if not keep_activations:
                drop_activations(stores.values())
        self.lap("dictionaries")

    def _job(self, cell: Measured, store: Stores) -> Callable[[], list[Row]]:
        return partial(cell.measure, store, self.root, device=self.device)

    def rows(self, cells: Sequence[Measured]) -> list[Row]:
        """The rows of all cells, in their order."""
        return [row for cell in cells for row in read_rows(self._rows_of(cell))]

    def measure(self, jobs: Mapping[Path, Callable[[], list[Row]]], label: str) -> dict[Path, list[Row]]:
        """The rows of every job, kept in its file; a job whose file is there is not run."""
        for home in {path.parent for path in jobs}:
            home.mkdir(parents=True, exist_ok=True)
        self.run({path.stem: partial(_keep, job, path) for path, job in jobs.items() if not path.is_file()}, label)
        return {path: read_rows(path) for path in jobs}

    def _rows_of(self, cell: Measured) -> Path:
        return self.root / "cells" / f"{cell.name}.json"

    def results(
        self,
        rows: Sequence[Row],
        verdict: Verdict | None = None,
        *,
        config: Any,
        tokens: PreparedTokens | None = None,
        **origin: Any,
    ) -> Results:
        """Everything measured, what is said of it, and where it came from; `origin` is the rest of `Provenance`."""
        run = describe_run(to_mapping(config), device={"cpu_kernels": cpu_form()})
        fingerprint = "" if tokens is None else tokens.train.fingerprint
        provenance = Provenance(**run, **origin, tokens_fingerprint=fingerprint, seconds=self.seconds)
        return Results(LongTable(tuple(rows)), verdict, provenance)


def default_workers(device: str) -> int:
    """One process a core on a CPU, one in all on a GPU."""
    return 1 if device != "cpu" else max(1, os.cpu_count() or 1)


def _begin_process(leash: Connection) -> None:
    threading.Thread(target=_end_with, args=(leash,), daemon=True).start()
    torch.set_num_threads(1)
    gc.freeze()  # what was imported stays, and is not looked through for garbage at every few steps: a tenth faster


def _end_with(leash: Connection) -> None:
    """End this process when the other end of a pipe is closed: by its owner, or by whatever ends that one."""
    with contextlib.suppress(EOFError, OSError):
        leash.recv_bytes()
    os._exit(1)


def _keep(measure: Callable[[], list[Row]], path: Path) -> None:
    write_rows(path, measure())


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
