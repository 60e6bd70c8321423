"""What a run keeps when it is stopped, and that nobody else writes to its folder meanwhile."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from crosscoder.foundation.lock import locked
from crosscoder.foundation.signals import Stopped
from crosscoder.training.checkpoint import RunLog, latest_checkpoint, read_cursor
from crosscoder.training.state import TrainState
from crosscoder.training.step import TrainConfig
from crosscoder.training.together import require_same_replicas

SET_BY_STEPS = ("warmup_steps", "penalty_warmup_steps", "log_every")
"""What a budget derives from its number of steps."""


class TornStepError(KeyboardInterrupt):
    """A step was interrupted between its halves; the state is of no use any more."""


@contextlib.contextmanager
def one_writer(folders: Iterable[Path | None]) -> Generator[None]:
    """Holds the locks of all folders."""
    with contextlib.ExitStack() as stack:
        for folder in folders:
            if folder is not None:
                stack.enter_context(locked(folder))
        yield


def keep_stopped(
    runs: Sequence[RunLog], states: Sequence[TrainState], stop: KeyboardInterrupt, n_steps: int | None
) -> KeyboardInterrupt:
    """Write a checkpoint of every run, unless a step was torn; returns what to raise, which says where they are."""
    steps = {state.step for state in states}
    is_whole = not isinstance(stop, TornStepError) and len(steps) == 1
    if states[0].dictionary.shard is not None and not isinstance(stop, Stopped):
        is_whole = False  # this rank alone was interrupted, and the parts of the others are not to be had
    if is_whole and steps != {0}:
        require_same_replicas(states)
        for run, state in zip(runs, states, strict=True):
            run.checkpoint(state)
    kept = ", ".join(filter(None, (run.kept for run in runs)))
    why = str(stop) if isinstance(stop, Stopped) else "interrupted"
    where = f"after {max(steps):,} of {n_steps:,} steps" if n_steps else f"after {max(steps):,} steps"
    if not is_whole:
        where = f"in the middle of step {max(steps):,}, which is lost"
    said = f"{why} {where}; " + (f"kept in {kept}" if kept else "nothing is kept")
    return Stopped(said) if isinstance(stop, Stopped) else KeyboardInterrupt(said)


def lengthened(folder: Path, config: TrainConfig) -> TrainConfig:
    """The settings with which a run in `folder` goes on: what a budget derives from the number of steps stays as the
    run began."""
    home = folder if (folder / "checkpoints").is_dir() else folder / "layer-0"
    newest = latest_checkpoint(home / "checkpoints")
    saved = read_cursor(newest).get("settings", {}).get("training", {})
    return replace(config, **{name: saved[name] for name in SET_BY_STEPS if name in saved})
