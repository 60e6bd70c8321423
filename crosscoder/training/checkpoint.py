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
    """Write `state` to `step-N` under `folder`, and remove all but the newest two up to this step.

    One of a later step is left of a run that could not go on from it.
    """
    tensors = {"firing.silent": state.firing.silent_GF.cpu()}
    if state.start_RN is not None:
        tensors["frozen.start"] = state.start_RN.cpu()
    for name, parameter in state.dictionary.named_parameters():
        for key, value in state.optimizer.state.get(parameter, {}).items():
            tensors[f"adam.{key}.{name}"] = value.detach().cpu().contiguous()
    with committed_directory(folder / f"step-{state.step:09d}", schema=SCHEMA) as temporary:
        write_dictionary(state.dictionary, temporary)
        save_file(tensors, temporary / "optimizer.safetensors")
        cursor = {"step": state.step, "tokens": state.tokens, "first_batch": state.first_batch}
        write_json(temporary / "state.json", {**cursor, "settings": settings})
    kept = [path for path in checkpoints_in(folder) if step_of(path) <= state.step][-KEEP:]
    for old in checkpoints_in(folder):
        if old not in kept:
            shutil.rmtree(old, ignore_errors=True)


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
        try:
            verify_directory(path, schema=SCHEMA, required=FILES)
        except (DamagedArtifactError, FileNotFoundError) as error:
            say(f"passing over a damaged checkpoint: {error}")
            continue
        return path
    return None


def step_of(checkpoint: Path | None) -> int:
    """After how many steps a checkpoint was written; 0 where there is none."""
    return 0 if checkpoint is None else int(checkpoint.name.removeprefix("step-"))


def read_cursor(checkpoint: Path | None) -> dict[str, Any]:
    """Where a checkpoint's run was: `step`, `tokens`, the hash of its `first_batch`, and its settings."""
    return {} if checkpoint is None else read_json(checkpoint / "state.json")


def require_settings(checkpoint: Path, settings: dict[str, Any]) -> None:
    """Refuse a checkpoint that was written under other settings; every differing one is named.

    Raises:
        ValueError: as said.
    """
    old, new = _flatten(read_cursor(checkpoint)["settings"]), _flatten(settings)
    differing = [
        f"{key}: checkpoint {old.get(key)!r}, now {new.get(key)!r}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
    ]
    if differing:
        raise ValueError(
            f"{checkpoint} was written under other settings, and continuing would mix two runs: {'; '.join(differing)}."
            " Restore the settings, or start in a new folder."
        )


def load_checkpoint(path: Path, state: TrainState) -> None:
    """Fill `state` from a verified checkpoint of the same settings."""
    saved = read_cursor(path)
    state.dictionary.load_state_dict(load_file(path / "model.safetensors"))
    tensors, parameters = load_file(path / "optimizer.safetensors"), dict(state.dictionary.named_parameters())
    state.firing.silent_GF.copy_(tensors.pop("firing.silent"))
    if state.start_RN is not None:
        state.start_RN.copy_(tensors.pop("frozen.start"))
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
        """The newest verified checkpoint, of those of certain steps if they are given.

        Raises:
            ValueError: it was written under other settings.
        """
        if self._folder is None:
            return None
        if (path := latest_checkpoint(self._folder / "checkpoints", among=among)) is not None:
            require_settings(path, self._settings)
        return path

    def is_past_first_checkpoint(self) -> bool:
        """Whether more would be lost by beginning again than what one checkpoint holds."""
        if self._folder is None:
            return False
        return len(checkpoints_in(self._folder / "checkpoints")) > 1 or (self._folder / "dictionary").is_dir()

    def begin(self, state: TrainState, newest: Path | None) -> None:
        """Load a checkpoint into `state`, and the metrics up to its step, if there is one, and begin to log."""
        if self._folder is None:
            return
        path = self._folder / "metrics.jsonl"
        if newest is not None:
            load_checkpoint(newest, state)
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


def find_checkpoints(runs: Sequence[RunLog], *, resume: bool) -> list[Path | None]:
    """What runs of dictionaries that are trained together begin from: checkpoints of the newest step that all have.

    Raises:
        ValueError: there are checkpoints, and nobody asked to resume; they are of other settings; or no step is common
            to all, and more than one checkpoint of work would be lost by beginning again.
    """
    newest = [run.newest() for run in runs]
    furthest = max(newest, key=step_of)
    if not resume and furthest is not None:
        raise ValueError(
            f"{furthest.parents[1]} already holds {furthest.name}; pass resume=True, or choose a new folder"
        )
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


def _read_metrics(path: Path) -> list[Entry]:
    """Whole lines only: a process killed while writing leaves a torn last one."""
    entries = []
    for line in path.read_text().splitlines() if path.is_file() else ():
        try:
            entries.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return entries
