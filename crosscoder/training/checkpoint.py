"""The files of one training run: metrics, record, checkpoints, and at the end the dictionary.

A checkpoint is everything that affects the future of a run, committed whole, verified before use, never pickled.
"""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from crosscoder.dictionary.division import save_whole, whole_tensors
from crosscoder.dictionary.shard import Shard
from crosscoder.foundation.artifact import (
    DamagedArtifactError,
    committed_directory,
    read_json,
    replace_file,
    sync_path,
    verify_directory,
    write_json,
)
from crosscoder.foundation.console import say
from crosscoder.foundation.damage import reading
from crosscoder.foundation.disk import naming_full_disk, require_room
from crosscoder.foundation.failpoints import failpoint
from crosscoder.foundation.lock import remove_leftovers
from crosscoder.foundation.provenance import describe_run
from crosscoder.foundation.tensors import pass_on, read_part, read_tensors, table_of, write_tensors
from crosscoder.training.curves import draw_curves
from crosscoder.training.finite import require_sound
from crosscoder.training.history import METRICS, Entry, line_of, read_history
from crosscoder.training.lengthen import OF_STEPS, Stretch
from crosscoder.training.loggers import SafeLogger
from crosscoder.training.parts import own_pieces, whole_like, whole_tensors_of
from crosscoder.training.state import MOMENTS, TrainState

SCHEMA = "crosscoder.checkpoint/1"
KEEP = 2
FILES = ("config.json", "model.safetensors", "optimizer.safetensors", "state.json")
CURSOR = ("step", "tokens", "first_batch", "rise_from")
"""What a state holds besides tensors."""


def save_checkpoint(state: TrainState, folder: Path, *, settings: dict[str, Any], lines: Sequence[str] = ()) -> None:
    """Write `state` to `step-N` under `folder`, and remove all but the newest two whole ones up to this step.

    One of a later step is left of a run that could not go on from it. lines: what was logged up to here. Ranks that
    divide a dictionary all call it; rank 0 writes what one process would, from their parts as these come.
    """
    weights, tensors = whole_tensors(state.dictionary), whole_tensors_of(state)
    if (shard := state.dictionary.shard) is not None and not shard.ranks.job.is_first:
        pass_on(weights)
        pass_on(tensors)
        return
    with committed_directory(folder / f"step-{state.step:09d}", schema=SCHEMA) as temporary:
        state.dictionary.write_files(temporary, weights)
        write_tensors(tensors, temporary / "optimizer.safetensors")
        cursor: dict[str, Any] = {name: getattr(state, name) for name in CURSOR}
        write_json(temporary / "state.json", {**cursor, "settings": settings})
        (temporary / METRICS).write_text("".join(lines), encoding="utf-8")
    earlier = [path for path in checkpoints_in(folder) if step_of(path) <= state.step]
    kept = [path for path in earlier if not fault_of(path, hashes=False)][-KEEP:]
    for old in checkpoints_in(folder):
        if old not in kept:
            failpoint("checkpoint.prune")
            shutil.rmtree(old, ignore_errors=True)
    failpoint("checkpoint.end")


def checkpoint_bytes(state: TrainState) -> dict[str, int]:
    """The bytes of a checkpoint's large files."""
    dictionary = state.dictionary

    def size(name: str, tensor: Tensor) -> int:
        whole = whole_like(name, tensor, dictionary)
        return whole.numel() * whole.itemsize

    parameters = sum(size(name, tensor) for name, tensor in dictionary.named_parameters())
    start = 0 if state.start_RN is None else size("frozen.start", state.start_RN)
    weights = sum(size(name, tensor) for name, tensor in dictionary.state_dict().items())
    return {"model": weights, "optimizer": 2 * parameters + size("firing.silent", state.firing.silent_GF) + start}


def checkpoints_in(folder: Path) -> list[Path]:
    """Committed checkpoints, oldest first."""
    return sorted(folder.glob("step-" + 9 * "[0-9]"))


def latest_checkpoint(folder: Path, *, among: set[int] | None = None) -> Path | None:
    """The newest checkpoint whose every file verifies; damaged ones are named and passed over.

    among: steps, where not every checkpoint will do.
    """
    for path in reversed(checkpoints_in(folder)):
        if among is not None and step_of(path) not in among:
            continue
        if not (fault := fault_of(path)):
            return path
        say(f"passing over a damaged checkpoint: {fault}")
    return None


def fault_of(checkpoint: Path, *, hashes: bool = True) -> str:
    """What is wrong with a checkpoint; empty if its every file verifies."""
    try:
        verify_directory(checkpoint, schema=SCHEMA, required=FILES, hashes=hashes)
    except (ValueError, OSError) as error:
        return str(error)
    return ""


def set_damaged_aside(folder: Path, *, after: int) -> None:
    """Give the damaged checkpoints of later steps than one other names, so that their place can be taken.

    They stay for whoever wants to look what can be had of them.
    """
    for path in checkpoints_in(folder):
        if step_of(path) > after and fault_of(path):
            aside = path.with_name(f"damaged-{path.name}-{uuid.uuid4().hex[:6]}")
            path.rename(aside)
            say(f"the damaged {path.name} is kept as {aside}; delete it when nobody needs it")


def step_of(checkpoint: Path | None) -> int:
    """After how many steps a checkpoint was written; 0 where there is none."""
    return 0 if checkpoint is None else int(checkpoint.name.removeprefix("step-"))


def read_cursor(checkpoint: Path | None) -> dict[str, Any]:
    """Where a checkpoint's run was: `step`, `tokens`, the hash of its `first_batch`, and its settings."""
    if checkpoint is None:
        return {}
    path = checkpoint / "state.json"
    found = read_json(path)
    with reading(path):
        kinds = {"step": int, "tokens": int, "first_batch": str, "settings": dict}
        wrong = [name for name, kind in kinds.items() if type(found[name]) is not kind]
        if wrong or found["step"] != step_of(checkpoint):
            raise ValueError(f"{', '.join(wrong) or 'step'} is none of a checkpoint of step {step_of(checkpoint)}")
    return found


def require_settings(checkpoint: Path, settings: dict[str, Any]) -> None:
    """Refuse a checkpoint that was written under other settings; every differing one is named.

    The number of steps may be another (see `lengthen`), where it is named and not that of the batches that there are.

    Raises:
        ValueError: as said, or fewer steps than were taken.
    """
    old, new = _flatten(read_cursor(checkpoint)["settings"]), _flatten(settings)
    steps = new["training.steps"]
    free = OF_STEPS if None not in (steps, old.get("training.steps")) else ()
    differing = [
        f"{key}: checkpoint {old.get(key)!r}, now {new.get(key)!r}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key) and key not in free
    ]
    if steps is not None and steps < step_of(checkpoint) and not differing:
        raise ValueError(f"{checkpoint} has taken more than the {steps} steps that are asked for; ask for more")
    if differing:
        raise ValueError(
            f"{checkpoint} was written under other settings, and continuing would mix two runs: {'; '.join(differing)}."
            " Restore the settings, or start in a new folder."
        )


def load_checkpoint(path: Path, state: TrainState) -> None:
    """Fill `state` from a verified checkpoint of the same settings; a rank reads its own part.

    Raises:
        DamagedArtifactError: it does not hold the tensors that it should.
    """
    saved, dictionary = read_cursor(path), state.dictionary
    pieces = partial(own_pieces, dictionary=dictionary)
    weights = read_tensors(path / "model.safetensors", dictionary.tensor_shapes(dictionary.config), pieces)
    with reading(path / "optimizer.safetensors"), safe_open(path / "optimizer.safetensors", framework="pt") as stream:
        table = table_of(stream)
        moments = {name: tensor for name, tensor in table.items() if name.startswith("adam.")}
        own = {name: tensor for name, tensor in table.items() if name not in moments}
        targets = {"firing.silent": state.firing.silent_GF}
        targets |= {} if state.start_RN is None else {"frozen.start": state.start_RN}
        _require_alike(own, {name: whole_like(name, one, dictionary) for name, one in targets.items()})
        parameters = dict(dictionary.named_parameters())
        shapes: dict[str, Tensor] = {
            f"adam.{key}.{name}": whole_like(name, one, dictionary)
            for name, one in parameters.items()
            for key in MOMENTS
        }
        shapes |= {f"adam.step.{name}": torch.zeros(()) for name in parameters}
        begun = {name.split(".", 2)[2] for name in moments}  # what stays as it began has none
        _require_alike(moments, {name: one for name, one in shapes.items() if name.split(".", 2)[2] in begun})
        parts = {name: read_part(stream, name, pieces(name)) for name in table}
        if infinite := [name for name, part in parts.items() if not bool(torch.isfinite(part).all())]:
            raise ValueError(f"{infinite[0]} holds NaN or infinity")
    dictionary.load_state_dict(weights)
    for name, target in targets.items():
        target.copy_(parts[name])
    for key in moments:
        _, moment, name = key.split(".", 2)
        device = "cpu" if moment == "step" else parameters[name].device
        state.optimizer.state[parameters[name]][moment] = parts.pop(key).to(device).clone()
    for name in CURSOR:
        setattr(state, name, saved.get(name, 0))  # one of version 0.2 keeps no `rise_from`


def _require_alike(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Refuse tensors of other names, shapes or dtypes."""
    if found.keys() != expected.keys():
        raise ValueError(f"tensors are {sorted(found)}, expected {sorted(expected)}")
    for name, tensor in found.items():
        if (tensor.shape, tensor.dtype) != (expected[name].shape, expected[name].dtype):
            raise ValueError(
                f"{name} is {tensor.dtype} {tuple(tensor.shape)}, expected {expected[name].dtype} "
                f"{tuple(expected[name].shape)}"
            )


def _flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix.rstrip("."): value}
    return {k: v for key, item in value.items() for k, v in _flatten(item, f"{prefix}{key}.").items()}


class RunLog:
    """The metrics of one run, told to a logger, and in its folder metrics.jsonl, run.json, curves, dictionary/, ...

    is_scratch: the folder is made with the first checkpoint, and gets no dictionary.
    shard: of a dictionary that ranks divide: all of them read, and rank 0 alone writes.
    """

    def __init__(
        self,
        folder: Path | None,
        settings: dict[str, Any],
        logger: SafeLogger | None = None,
        *,
        is_scratch: bool = False,
        shard: Shard | None = None,
    ) -> None:
        self._folder, self._settings, self._is_scratch = folder, settings, is_scratch
        self._mesh = None if shard is None else shard.mesh
        self._writes = shard is None or shard.ranks.job.is_first
        self._logger = logger if self._writes else None
        self._kept_step = -1  # of the checkpoint that was written or loaded last
        self._kept_lines = 0  # of the history in it
        self.metrics: list[Entry] = []
        self._lines: list[str] = []

    def newest(self, *, among: set[int] | None = None) -> Path | None:
        """The newest verified checkpoint, of those of certain steps if they are given.

        Raises:
            ValueError: it was written under other settings.
            DamagedArtifactError: there are several checkpoints, and none verifies.
        """
        if self._folder is None:
            return None
        home = self._folder / "checkpoints"
        if (path := latest_checkpoint(home, among=among)) is not None:
            require_settings(path, self._settings)
        elif among is None and len(there := checkpoints_in(home)) > 1:
            raise DamagedArtifactError(
                f"none of the {len(there)} checkpoints in {home} can be read; restore one from a copy, or move {home} "
                "away to begin again"
            )
        return path

    def require_unused(self) -> None:
        """Refuse a folder that holds a checkpoint, damaged or of whatever settings; a ValueError names it."""
        for path in [] if self._folder is None else checkpoints_in(self._folder / "checkpoints")[-1:]:
            raise ValueError(
                f"{self._folder} already holds {path.name}; pass resume=True (--resume), or choose a new folder"
            )

    def is_past_first_checkpoint(self) -> bool:
        """Whether more would be lost by beginning again than what one checkpoint holds."""
        if self._folder is None:
            return False
        return len(checkpoints_in(self._folder / "checkpoints")) > 1 or (self._folder / "dictionary").is_dir()

    def begin(self, state: TrainState, newest: Path | None) -> None:
        """Load a checkpoint into `state`, and the metrics up to its step, if there is one, and begin to log."""
        if self._folder is None:
            return
        if newest is not None:
            load_checkpoint(newest, state)
            self.metrics = read_history(newest, self._folder / METRICS, state.step)
            self._lines = [line_of(entry) for entry in self.metrics]
            self._kept_step, self._kept_lines = state.step, len(self._lines)
            Stretch.of(read_cursor(newest)["settings"]["training"], self._settings["training"]).begin(state)
        if not self._writes:
            return
        set_damaged_aside(self._folder / "checkpoints", after=step_of(newest))
        if not self._is_scratch:
            self._folder.mkdir(parents=True, exist_ok=True)
            remove_leftovers(self._folder, self._folder / "checkpoints")
            n_there, every = len(checkpoints_in(self._folder / "checkpoints")), self._settings["training"]
            copies = max(1, (KEEP + 1 if every["checkpoint_every"] else 1) - n_there)
            require_room(self._folder, checkpoint_bytes(state), copies=copies, what="checkpoint")
            self._begin_log()

    def _begin_log(self) -> None:
        assert self._folder is not None
        self._folder.mkdir(parents=True, exist_ok=True)
        record = describe_run(self._settings)
        write_json(self._folder / "run.json", record if self._mesh is None else {**record, "mesh": self._mesh})
        replace_file(self._folder / METRICS, "".join(self._lines).encode())

    def log(self, entry: Entry) -> None:
        self.metrics.append(entry)
        self._lines.append(line_of(entry))
        if self._folder is not None and not self._is_scratch and self._writes:
            failpoint("metrics.line")
            path = self._folder / METRICS
            with naming_full_disk(path, path), path.open("a", encoding="utf-8") as stream:
                stream.write(self._lines[-1])
        if self._logger is not None:
            self._logger.log(entry)

    def checkpoint(self, state: TrainState) -> None:
        """Write a checkpoint, unless the last one is of this step with all that was logged up to it."""
        require_sound(state)
        if self._folder is None or (self._kept_step, self._kept_lines) == (state.step, len(self._lines)):
            return
        if self._is_scratch:
            self._begin_log()
        if self._writes:
            sync_path(self._folder / METRICS)
        save_checkpoint(state, self._folder / "checkpoints", settings=self._settings, lines=self._lines)
        self._kept_step, self._kept_lines = state.step, len(self._lines)

    @property
    def kept(self) -> str:
        """The checkpoint that is gone on from, for people; empty where there is none."""
        if self._folder is None or self._kept_step < 0:
            return ""
        return str(self._folder / "checkpoints" / f"step-{self._kept_step:09d}")

    def finish(self, state: TrainState) -> None:
        require_sound(state)
        if self._folder is not None and not self._is_scratch:
            self.checkpoint(state)
            save_whole(state.dictionary, self._folder / "dictionary")
            if self._writes:
                draw_curves(self._folder)


def find_checkpoints(runs: Sequence[RunLog], *, resume: bool) -> list[Path | None]:
    """What runs of dictionaries that are trained together begin from: checkpoints of the newest step that all have.

    Raises:
        ValueError: there are checkpoints, and nobody asked to resume; they are of other settings; or no step is common
            to all, and more than one checkpoint of work would be lost by beginning again.
    """
    if not resume:
        for run in runs:
            run.require_unused()
    newest = [run.newest() for run in runs]
    furthest = max(newest, key=step_of)
    while len(steps := {step_of(path) for path in newest}) > 1:  # killed between two saves
        among = set(range(1, min(steps) + 1))
        newest = [run.newest(among=among) for run in runs]
    if furthest is not None and (common := step_of(newest[0])) < step_of(furthest):
        if common == 0 and any(run.is_past_first_checkpoint() for run in runs):
            raise ValueError(
                f"{furthest.parents[1]} holds {furthest.name}, and another of the dictionaries has no checkpoint of a "
                "step that all have, so all would begin again; train those that have none in a folder of their own, or "
                "all in a new one"
            )
        say(f"{furthest.parents[1]} was at step {step_of(furthest)}; all go on together from step {common}")
    return newest
