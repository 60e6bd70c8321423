"""The files of one training run: metrics, record, checkpoints, and at the end the dictionary.

A checkpoint is everything that affects the future of a run, committed whole, verified before use, never pickled.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from crosscoder.dictionary.dictionary import write_dictionary
from crosscoder.foundation.artifact import (
    DamagedArtifactError,
    committed_directory,
    read_json,
    verify_directory,
    write_json,
)
from crosscoder.foundation.console import say
from crosscoder.foundation.provenance import describe_run
from crosscoder.training.state import TrainState

SCHEMA = "crosscoder.checkpoint/1"
KEEP = 2
FILES = ("config.json", "model.safetensors", "optimizer.safetensors", "state.json")
Entry = dict[str, float | None]


def save_checkpoint(state: TrainState, folder: Path, *, settings: dict[str, Any]) -> None:
    """Write `state` to `step-N` under `folder`, and remove all but the newest two."""
    tensors = {"firing.silent": state.firing.silent_GF.cpu()}
    for name, parameter in state.dictionary.named_parameters():
        for key, value in state.optimizer.state.get(parameter, {}).items():
            tensors[f"adam.{key}.{name}"] = value.detach().cpu().contiguous()
    with committed_directory(folder / f"step-{state.step:09d}", schema=SCHEMA) as temporary:
        write_dictionary(state.dictionary, temporary)
        save_file(tensors, temporary / "optimizer.safetensors")
        cursor = {"step": state.step, "tokens": state.tokens, "first_batch": state.first_batch}
        write_json(temporary / "state.json", {**cursor, "settings": settings})
    for old in _checkpoints(folder)[:-KEEP]:
        shutil.rmtree(old, ignore_errors=True)


def _checkpoints(folder: Path) -> list[Path]:
    """Committed checkpoints, oldest first."""
    return sorted(folder.glob("step-" + 9 * "[0-9]"))


def latest_checkpoint(folder: Path, *, among: set[int] | None = None) -> Path | None:
    """The newest checkpoint whose every file verifies; damaged ones are named and passed over.

    among: steps, where not every checkpoint will do.
    """
    for path in reversed(_checkpoints(folder)):
        if among is not None and _step(path) not in among:
            continue
        try:
            verify_directory(path, schema=SCHEMA, required=FILES)
        except (DamagedArtifactError, FileNotFoundError) as error:
            say(f"passing over a damaged checkpoint: {error}")
            continue
        return path
    return None


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def load_checkpoint(path: Path, state: TrainState, *, settings: dict[str, Any]) -> None:
    """Fill `state` from a verified checkpoint.

    Raises:
        ValueError: the checkpoint was written under other settings; every differing one is named.
    """
    saved = read_json(path / "state.json")
    old, new = _flatten(saved["settings"]), _flatten(settings)
    differing = [
        f"{key}: checkpoint {old.get(key)!r}, now {new.get(key)!r}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
    ]
    if differing:
        raise ValueError(
            f"{path} was written under other settings, and continuing would mix two runs: {'; '.join(differing)}. "
            "Restore the settings, or start in a new folder."
        )
    state.dictionary.load_state_dict(load_file(path / "model.safetensors"))
    tensors, parameters = load_file(path / "optimizer.safetensors"), dict(state.dictionary.named_parameters())
    state.firing.silent_GF.copy_(tensors.pop("firing.silent"))
    for key, value in tensors.items():
        _, moment, name = key.split(".", 2)
        device = "cpu" if moment == "step" else parameters[name].device
        state.optimizer.state[parameters[name]][moment] = value.to(device).clone()
    state.step, state.tokens, state.first_batch = int(saved["step"]), int(saved["tokens"]), saved["first_batch"]


def _flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix.rstrip("."): value}
    return {k: v for key, item in value.items() for k, v in _flatten(item, f"{prefix}{key}.").items()}


class RunLog:
    """The metrics of one run and, where it has a folder, its metrics.jsonl, run.json, checkpoints/ and dictionary/."""

    def __init__(self, folder: Path | None, settings: dict[str, Any]) -> None:
        self._folder, self._settings = folder, settings
        self.metrics: list[Entry] = []

    def newest(self, *, among: set[int] | None = None) -> Path | None:
        """The newest verified checkpoint, of those of certain steps if they are given."""
        return None if self._folder is None else latest_checkpoint(self._folder / "checkpoints", among=among)

    def begin(self, state: TrainState, newest: Path | None) -> None:
        """Load a checkpoint into `state`, and the metrics up to its step, if there is one, and begin to log."""
        if self._folder is None:
            return
        path = self._folder / "metrics.jsonl"
        if newest is not None:
            load_checkpoint(newest, state, settings=self._settings)
            self.metrics = [entry for entry in _read_metrics(path) if (entry["step"] or 0) <= state.step]
        self._folder.mkdir(parents=True, exist_ok=True)
        write_json(self._folder / "run.json", describe_run(self._settings))
        path.write_text("".join(json.dumps(entry) + "\n" for entry in self.metrics))

    def log(self, entry: Entry) -> None:
        self.metrics.append(entry)
        if self._folder is not None:
            with (self._folder / "metrics.jsonl").open("a") as stream:
                stream.write(json.dumps(entry) + "\n")

    def checkpoint(self, state: TrainState) -> None:
        if self._folder is not None:
            save_checkpoint(state, self._folder / "checkpoints", settings=self._settings)

    def finish(self, state: TrainState) -> None:
        if self._folder is not None:
            if not (self._folder / "checkpoints" / f"step-{state.step:09d}").exists():
                self.checkpoint(state)
            state.dictionary.save_pretrained(self._folder / "dictionary")


def open_together(runs: Sequence[RunLog], states: Sequence[TrainState], *, resume: bool) -> None:
    """Begin the runs of dictionaries that are trained together, all from the newest step that all can begin from.

    Raises:
        ValueError: there are checkpoints, and nobody asked to resume.
    """
    newest = [run.newest() for run in runs]
    if not resume and (found := next((path for path in newest if path is not None), None)):
        raise ValueError(f"{found.parents[1]} already holds {found.name}; pass resume=True, or choose a new folder")
    while len(steps := {0 if path is None else _step(path) for path in newest}) > 1:  # killed between two saves
        among = set(range(1, min(steps) + 1))
        newest = [run.newest(among=among) for run in runs]
    for run, state, path in zip(runs, states, newest, strict=True):
        run.begin(state, path)


def _read_metrics(path: Path) -> list[Entry]:
    """Whole lines only: a process killed while writing leaves a torn last one."""
    entries = []
    for line in path.read_text().splitlines() if path.is_file() else ():
        try:
            entries.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return entries
