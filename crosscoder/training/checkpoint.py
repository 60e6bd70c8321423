"""The files of one training run: metrics, record, checkpoints, and at the end the dictionary.

A checkpoint is everything that affects the future of a run, committed whole, verified before use, never pickled.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from crosscoder.dictionary.pretrained import write_dictionary
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
_STEP = re.compile(r"^step-(\d{9})$")


def _optimizer_tensors(state: TrainState) -> dict[str, Tensor]:
    tensors = {"firing.silent": state.firing.silent_GF.cpu()}
    for name, parameter in state.dictionary.named_parameters():
        for key, value in state.optimizer.state.get(parameter, {}).items():
            tensors[f"adam.{key}.{name}"] = value.detach().cpu().contiguous()
    return tensors


def save_checkpoint(state: TrainState, folder: Path, *, settings: dict[str, Any]) -> Path:
    """The folder `step-N` under `folder` that now holds `state`; all but the newest two are then removed."""
    final = folder / f"step-{state.step:09d}"
    with committed_directory(final, schema=SCHEMA) as temporary:
        write_dictionary(state.dictionary, temporary)
        save_file(_optimizer_tensors(state), temporary / "optimizer.safetensors")
        cursor = {"step": state.step, "tokens": state.tokens, "first_batch": state.first_batch}
        write_json(temporary / "state.json", {**cursor, "settings": settings})
    for _, old in _step_folders(folder)[:-KEEP]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def _step_folders(folder: Path) -> list[tuple[int, Path]]:
    """Committed checkpoints, oldest first."""
    if not folder.is_dir():
        return []
    found = [(int(match[1]), path) for path in folder.iterdir() if (match := _STEP.match(path.name))]
    return sorted(found)


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint whose every file verifies; damaged ones are named and passed over."""
    for _, path in reversed(_step_folders(folder)):
        try:
            verify_directory(path, schema=SCHEMA, required=FILES)
        except (DamagedArtifactError, FileNotFoundError) as error:
            say(f"passing over a damaged checkpoint: {error}")
            continue
        return path
    return None


def load_checkpoint(path: Path, state: TrainState, *, settings: dict[str, Any]) -> None:
    """Fill `state` from a verified checkpoint.

    Raises:
        ValueError: the checkpoint was written under other settings; every differing one is named.
    """
    saved = read_json(path / "state.json")
    _refuse_other_settings(saved["settings"], settings, path)
    state.dictionary.load_state_dict(load_file(path / "model.safetensors"))
    tensors = load_file(path / "optimizer.safetensors")
    state.firing.silent_GF.copy_(tensors["firing.silent"])
    for name, parameter in state.dictionary.named_parameters():
        entry = {}
        for key in ("step", "exp_avg", "exp_avg_sq"):
            value = tensors.get(f"adam.{key}.{name}")
            if value is not None:
                entry[key] = value.clone() if key == "step" else value.to(parameter.device).clone()
        if entry:
            state.optimizer.state[parameter] = entry
    state.step, state.tokens, state.first_batch = int(saved["step"]), int(saved["tokens"]), saved["first_batch"]


def _flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix.rstrip("."): value}
    return {k: v for key, item in value.items() for k, v in _flatten(item, f"{prefix}{key}.").items()}


def _refuse_other_settings(saved: dict[str, Any], wanted: dict[str, Any], path: Path) -> None:
    old, new = _flatten(saved), _flatten(wanted)
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


class RunFolder:
    """The files of one run: metrics.jsonl, run.json, checkpoints/ and, at the end, dictionary/."""

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        self._folder, self._settings = folder, settings
        self._metrics = folder / "metrics.jsonl"

    def open(self, state: TrainState, *, resume: bool) -> list[Entry]:
        """Load the newest checkpoint into `state` if asked to; the metrics up to that step are returned."""
        newest = latest_checkpoint(self._folder / "checkpoints")
        if newest is not None and not resume:
            raise ValueError(f"{self._folder} already holds {newest.name}; pass resume=True, or choose a new folder")
        if newest is not None:
            load_checkpoint(newest, state, settings=self._settings)
        self._folder.mkdir(parents=True, exist_ok=True)
        write_json(self._folder / "run.json", describe_run(self._settings))
        kept = [entry for entry in _read_metrics(self._metrics) if (entry["step"] or 0) <= state.step]
        if newest is None:
            kept = []
        self._metrics.write_text("".join(json.dumps(entry) + "\n" for entry in kept))
        return kept

    def log(self, entry: Entry) -> None:
        with self._metrics.open("a") as stream:
            stream.write(json.dumps(entry) + "\n")

    def checkpoint(self, state: TrainState) -> None:
        save_checkpoint(state, self._folder / "checkpoints", settings=self._settings)

    def finish(self, state: TrainState) -> None:
        if not (self._folder / "checkpoints" / f"step-{state.step:09d}").exists():
            self.checkpoint(state)
        state.dictionary.save_pretrained(self._folder / "dictionary")


def _read_metrics(path: Path) -> list[Entry]:
    """Whole lines only: a process killed while writing leaves a torn last one."""
    if not path.is_file():
        return []
    entries = []
    for line in path.read_text().splitlines():
        try:
            entries.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return entries
