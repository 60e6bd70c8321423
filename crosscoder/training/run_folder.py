"""The files of one training run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from crosscoder.foundation.artifact import write_json
from crosscoder.foundation.provenance import describe_run
from crosscoder.training.checkpoint import TrainState, latest_checkpoint, load_checkpoint, save_checkpoint

Entry = dict[str, float | None]


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
        state.dictionary.save_pretrained(self._folder / "dictionary")  # ty: ignore[missing-attribute]


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
