"""Independent jobs on a few processes, one thread each, so that results do not depend on how many run at once."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import Any

from crosscoder.foundation.console import Progress, say


def default_workers(device: str) -> int:
    """One process a core on a CPU, one in all on a GPU."""
    return 1 if device != "cpu" else max(1, os.cpu_count() or 1)


def _prepare_worker(device: str) -> None:
    import torch

    if device == "cpu":
        torch.set_num_threads(1)


def run_jobs(jobs: Mapping[str, Callable[[], Any]], *, workers: int, device: str, label: str) -> dict[str, Any]:
    """The result of every job by name, in the order of `jobs`.

    On a CPU each job runs in a process of its own kind with one thread, also when `workers` is 1: the number of
    threads decides the order of sums, and so the last bits. On a GPU jobs run one after the other right here.

    Raises:
        RuntimeError: a job failed; names it, with its error as the cause.
    """
    results: dict[str, Any] = {}
    with Progress(label, len(jobs), unit="job") as progress:
        if device != "cpu":
            for name, job in jobs.items():
                results[name] = job()
                progress.advance()
            return results
        context = multiprocessing.get_context("spawn")
        pool = ProcessPoolExecutor(workers, context, initializer=_prepare_worker, initargs=(device,))
        with pool:
            futures = {pool.submit(job): name for name, job in jobs.items()}
            for future in as_completed(futures):
                name = futures[future]
                try:
                    results[name] = future.result()
                except Exception as error:
                    pool.shutdown(wait=False, cancel_futures=True)
                    say(f"{label}: {name} failed")
                    raise RuntimeError(f"{name} failed: {error}") from error
                progress.advance()
    return {name: results[name] for name in jobs}
