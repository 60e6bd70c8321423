"""A study's folder: every stage keeps its result there, so that what is done is not done twice."""

from __future__ import annotations

import contextlib
import functools
import gc
import hashlib
import importlib.util
import json
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.connection import wait as wait_for_any
from pathlib import Path
from typing import Any, Protocol

import torch

from crosscoder.data.prepare import prepare_tokens
from crosscoder.data.residuals import ResidualHarvester
from crosscoder.data.shards import ActivationShards, write_shards
from crosscoder.data.subject import count_parameters
from crosscoder.data.text import DEMO_SOURCE, unused_settings
from crosscoder.data.tokens import PreparedTokens, TokenBlocks
from crosscoder.foundation import signals
from crosscoder.foundation.artifact import file_sha256, read_sealed, write_sealed
from crosscoder.foundation.config import to_mapping
from crosscoder.foundation.console import Progress, say
from crosscoder.foundation.failpoints import failpoint
from crosscoder.foundation.lock import InUseError, locked, remove_leftovers
from crosscoder.foundation.origin import MismatchError
from crosscoder.foundation.provenance import describe_run
from crosscoder.foundation.tensors import save_tensors
from crosscoder.results.file import Provenance, Results, read_rows, write_rows
from crosscoder.results.table import LongTable, Row, State
from crosscoder.results.verdict import Verdict
from crosscoder.studies.stores import UNFINISHED, Stores
from triton_kernels import cpu_form

StoresOf = Mapping[tuple[str, int, State], Stores]
"""By shape, position of its training seed, and state."""


class Measured(Protocol):
    """What is measured on one model's activations and keeps its rows in a file: a cell, or a room."""

    @property
    def n_dictionaries(self) -> int:
        """How many are trained."""

    @property
    def name(self) -> str:
        """A file name of its own."""

    @property
    def read(self) -> tuple[str, int, State]:
        """The activations that it reads."""

    def measure(self, store: Stores, folder: Path, *, device: str = "cpu") -> list[Row]:
        """Its rows."""


STATES: tuple[State, ...] = ("trained", "untrained")
"""Of subjects that are harvested."""
POLL_SECONDS = 0.2
"""Between two looks at whether work is to stop, while processes work."""
GRACE_SECONDS = 60.0
"""That processes have to reach a safe point; after it they end, and only what they kept before is left."""
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
        signals.safe_point()

    @contextlib.contextmanager
    def alone(self, part: str = "") -> Generator[None]:
        """Nobody else works on this study meanwhile, but on other parts of it if this is one."""
        with signals.watching(), locked(self.root, shared=bool(part)):
            if part:
                with locked(self.root, name=f".lock-part-{part}"):
                    yield
                return
            remove_leftovers(self.root, *(path for path in self.root.rglob("*") if path.is_dir()))
            yield

    def run(self, jobs: Mapping[str, Callable[[], Any]], label: str) -> dict[str, Any]:
        """The result of every job by name, in the order of `jobs`.

        On a CPU each job runs in a process of its own kind with one thread, also when `workers` is 1: the number of
        threads decides the order of sums, and so the last bits. The processes are started once and serve every stage.
        On a GPU jobs run one after the other right here.

        Raises:
            RuntimeError: a job failed; names it, with its error as the cause.
            Stopped: work is to stop; every job that ran has reached a safe point, and kept what it goes on from.
        """
        if not jobs:
            return {}
        results: dict[str, Any] = {}
        with Progress(label, len(jobs), unit="job") as progress:
            if self.device != "cpu":
                for name, job in jobs.items():
                    signals.safe_point()
                    results[name] = job()
                    progress.advance()
                return results
            name = ""
            try:
                with signals.held_back():  # of what is started now, too
                    futures = {self._processes.submit(_begin_job, job): name for name, job in jobs.items()}
                left, reason = set(futures), ""
                while left:
                    if reason := reason or signals.requested():
                        self._stop(left, reason)
                    done, left = wait(left, POLL_SECONDS, FIRST_COMPLETED)
                    for future in done:
                        name = futures[future]
                        try:
                            results[name] = future.result()
                        except signals.Stopped as stop:
                            reason = f"one of its processes ({stop})"
                        progress.advance()
                if reason:
                    self._stop(left, reason)
            except BaseException as error:
                self._end_processes()
                if isinstance(error, BrokenProcessPool):
                    said = "a process was ended from outside, as where there is no memory left"
                    raise RuntimeError(f"{label}: {said}; {error}") from error
                if isinstance(error, Exception):
                    say(f"{label}: {name} failed")
                    raise RuntimeError(f"{name} failed: {error}") from error
                raise
        return {name: results[name] for name in jobs}

    def _stop(self, left: set[Future[Any]], reason: str) -> None:
        """Tell the processes to stop at their next safe point, wait until they have, and stop."""
        self._bell.close()
        running = {future for future in left if not future.cancel()}
        end = time.monotonic() + GRACE_SECONDS
        while running and time.monotonic() < end:
            say(f"waiting for {len(running)} jobs to reach a safe point")
            _, running = wait(running, min(10.0, GRACE_SECONDS))
        if running:
            say(f"{len(running)} jobs did not within {GRACE_SECONDS:.0f} s; what they kept before is what is left")
        raise signals.Stopped(f"stopped by {reason}; what was done is kept in {self.root}")

    def _end_processes(self) -> None:
        self._leash.close()
        self._bell.close()
        self._processes.shutdown(wait=False, cancel_futures=True)
        del self._processes

    @functools.cached_property
    def _processes(self) -> ProcessPoolExecutor:
        context = get_context("spawn")
        leash, self._leash = context.Pipe(duplex=False)
        bell, self._bell = context.Pipe(duplex=False)
        return ProcessPoolExecutor(self.workers, context, _begin_process, (leash, bell))

    def tokens(self, text: str, **settings: Any) -> PreparedTokens:
        """The study's text, prepared at the first call."""
        home = self.root / "tokens"
        said = False
        while not (home / "held_out").is_dir():
            try:
                prepare_tokens(text, **settings, folder=home, quiet=False)
            except InUseError as other:  # another part of this study
                said = said or say(f"waiting for another part: {other}") is None
                signals.safe_point()
                time.sleep(POLL_SECONDS)
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
        n_drawn = min(n_blocks, len(held_out))  # to the end of the text, so that no document is left out for its place
        blocks = torch.arange(n_drawn) * len(held_out) // max(1, n_drawn)
        save_tensors({"ids": held_out[blocks], "blocks": blocks}, self._splice_ids)

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
        left = {path.stem: path for path in jobs if not path.is_file()}
        self.run({name: partial(_keep, jobs[path], path, self.unfinished(name)) for name, path in left.items()}, label)
        return {path: read_rows(path) for path in jobs}

    def unfinished(self, name: str) -> Path:
        """Where the trainings of something that is measured go on from."""
        return self.root / UNFINISHED / name

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


def _begin_process(leash: Connection, bell: Connection) -> None:
    signals.obey_parent()
    threading.Thread(target=_listen, args=(leash, bell), daemon=True).start()
    torch.set_num_threads(1)
    gc.freeze()  # what was imported stays, and is not looked through for garbage at every few steps: a tenth faster


def _listen(leash: Connection, bell: Connection) -> None:
    """Stop at the next safe point when the other end of `bell` is closed, and end at once when that of `leash` is: by
    its owner, or by whatever ends that one."""
    if leash not in wait_for_any([leash, bell]):
        signals.request("its study")
        wait_for_any([leash])
    os._exit(1)


def _begin_job(job: Callable[[], Any]) -> Any:
    signals.safe_point()
    return job()


def _keep(measure: Callable[[], list[Row]], path: Path, unfinished: Path) -> None:
    write_rows(path, measure())
    failpoint("cell.rows")
    shutil.rmtree(unfinished, ignore_errors=True)


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


INPUTS = "inputs.json"


def require_inputs(folder: Path, **hashes: str) -> None:
    """Keep the hashes of a study's inputs in its folder, or compare them with those that its tokens were made from."""
    path = folder / INPUTS
    if not path.is_file() or not (folder / "tokens" / "held_out").is_dir():
        write_sealed(path, hashes)
        return
    known = read_sealed(path, mend="delete the folder for a new study")
    changed = [
        f"{name} (now {new[:12]}, then {str(known.get(name))[:12]})"
        for name, new in hashes.items()
        if known.get(name) != new
    ]
    if changed:
        raise MismatchError(
            f"{folder} was made from other inputs: {', '.join(changed)} changed since. Its results are not of what is "
            "there now: put the old ones back, or delete the folder (or give another --out) for a new study"
        )


def text_hash(source: str) -> str:
    """sha256 of the names and bytes of a text's files; of a data set on the Hub, which is not read here, its name's."""
    unused_settings(source)
    home = Path(source)
    if source == DEMO_SOURCE and (spec := importlib.util.find_spec(source)) and spec.submodule_search_locations:
        home = Path(spec.submodule_search_locations[0]) / "data"
    if not home.exists():
        return hashlib.sha256(source.encode()).hexdigest()
    inside = (path for path in home.rglob("*") if not re.search(r"(^|/)\.", path.relative_to(home).as_posix()))
    files = [home] if home.is_file() else sorted(path for path in inside if path.is_file())
    lines = [f"{path.relative_to(home)} {file_sha256(path)}" for path in files]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
