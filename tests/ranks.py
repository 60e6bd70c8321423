"""Ranks for tests: forked from a process that has imported what they need, joined by gloo over a file, with an end."""

import contextlib
import io
import multiprocessing
import os
import tempfile
import traceback
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from crosscoder.foundation.ranks import Ranks

SECONDS = 120
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["torch", "crosscoder.training", "tests.ranks"])


def _work(rank, size, folder, function, arguments):
    torch.set_num_threads(1)
    limit = timedelta(seconds=SECONDS / 2)
    dist.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=size, timeout=limit)
    status = 1
    try:
        found = io.BytesIO()
        torch.save(function(Ranks(dist.group.WORLD), *arguments), found)
        (Path(folder) / f"found-{rank}").write_bytes(found.getvalue())
        status = 0
    except BaseException:  # noqa: BLE001 - whatever it is, the test shows it
        (Path(folder) / f"error-{rank}").write_text(traceback.format_exc())
    os._exit(status)  # as a process that fails: nobody is told


def on_ranks(size, function, *arguments, fails=False):
    """What the function gives on each of `size` ranks; where it may fail, their errors."""
    with tempfile.TemporaryDirectory() as folder:
        given = [(rank, size, folder, function, arguments) for rank in range(size)]
        processes = [_CONTEXT.Process(target=_work, args=one) for one in given]
        for process in processes:
            process.start()
        for process in processes:
            process.join(SECONDS)
        stuck = [rank for rank, process in enumerate(processes) if process.is_alive()]
        for rank in stuck:
            processes[rank].kill()
        assert not stuck, f"ranks {stuck} did not end"
        errors = {}
        for rank in range(size):
            with contextlib.suppress(FileNotFoundError):
                errors[rank] = (Path(folder) / f"error-{rank}").read_text()
        if fails:
            return errors
        assert not errors, errors
        return [torch.load(Path(folder) / f"found-{rank}", weights_only=False) for rank in range(size)]
