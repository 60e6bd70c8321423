"""What `soak.py` kills: small runs of everything that can be gone on with, and what of them must be equal."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from crosscoder.data.prepare import prepare_tokens
from crosscoder.data.residuals import ResidualHarvester
from crosscoder.data.shards import write_shards
from crosscoder.data.sources import SiteSource
from crosscoder.data.stream import ActivationStream
from crosscoder.data.subject import build_subject
from crosscoder.data.subject_training import SubjectConfig, train_subject
from crosscoder.data.tokens import TokenBlocks
from crosscoder.dictionary import load_dictionary
from crosscoder.dictionary.division import shard_for
from crosscoder.foundation.ranks import Ranks
from crosscoder.measure.health import watch
from crosscoder.measure.reading import read_dictionary
from crosscoder.studies.budget import DictionaryBudget
from crosscoder.studies.cells import Cell, new_dictionary
from crosscoder.studies.folder import _keep
from crosscoder.studies.stores import Stores
from crosscoder.training import TrainConfig, train

S, VOCABULARY, STEPS = 16, 32, 24
CONFIG = TrainConfig(steps=STEPS, warmup_steps=4, log_every=1, checkpoint_every=4, dead_after_tokens=128)
SUBJECT = SubjectConfig(n_layers=1, d_model=16, context=S, head_dim=8, batch=8, tokens=12 * 8 * S, n_checkpoints=2)
Work = Callable[[Path, Ranks], None]
TRAINING, DONE = "training", "done"
"""Marks beside the folder of a run: all ranks are among its steps, and one of them (`done-0`) has taken the last."""


class Mark:
    """A logger, which rank 0 alone tells anything: the first step has been taken."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def log(self, _: dict[str, Any]) -> None:
        """Says so."""
        self.path.touch()


def blocks(n: int, seed: int) -> TokenBlocks:
    """Random tokens."""
    generator = torch.Generator().manual_seed(seed)
    return TokenBlocks(torch.randint(VOCABULARY, (n, S), generator=generator), vocab_size=VOCABULARY)


def harvester() -> ResidualHarvester:
    """A small model that is read at all sites."""
    model = build_subject(2, 16, vocab_size=VOCABULARY, context=S, head_dim=8, seed=0)
    return ResidualHarvester(model.eval().requires_grad_(False))


def train_cell(arm_name: Any, selection: Any, where: str, folder: Path, job: Ranks) -> None:
    """One run of a cell in a folder, from where it is; ranks read a store that lies beside all their runs."""
    read, splits = harvester(), {"train": blocks(96, 1), "held_out": blocks(24, 2)}
    if where == "store":
        home = folder if job.size == 1 else folder.parent / "store"

        def stores() -> list[Any]:
            return [write_shards(read, one, home / name, tokens_per_shard=512) for name, one in splits.items()]

        if job.size > 1:
            job.from_first(lambda: len(stores()))
        source = SiteSource(*stores(), "residual")
    else:
        ahead = ActivationStream(read, splits["train"], window_tokens=256, job=job.apart())
        source = SiteSource(ahead, ActivationStream(read, splits["held_out"], ahead=False), "residual")
    budget = DictionaryBudget(n_features=24, k_crosscoder=4, k_layerwise=3, selection=selection)
    share = partial(shard_for, ranks=job) if job.size > 1 else None
    dictionary = new_dictionary(arm_name, source, budget, seed=0, share=share)
    train(
        dictionary,
        source.batches(64, seed=0, steps=STEPS),
        config=CONFIG,
        folder=folder / "run",
        resume=True,
        data_fingerprint=source.fingerprint,
        monitor=partial(watch, batches=source.marked),
        monitor_every=5,
        logger=Mark(folder.parent / TRAINING),
        quiet=True,
    )
    (folder.parent / f"{DONE}-{job.rank}").touch()
    if isinstance(source.train, ActivationStream):
        source.train.settle()
    if job.is_first:
        read_dictionary(dictionary if job.size == 1 else load_dictionary(folder / "run/dictionary"), source.marked())


def train_results(folder: Path) -> dict[str, bytes]:
    """What must be equal of a run."""
    newest = max((folder / "run" / "checkpoints").iterdir())
    names = ("model.safetensors", "optimizer.safetensors", "state.json", "config.json")
    files = [*(newest / name for name in names), folder / "run" / "metrics.jsonl"]
    files.append(folder / "run" / "dictionary" / "model.safetensors")
    return {f"{path.parent.name}/{path.name}": path.read_bytes() for path in files}


def prepare_work(folder: Path, _: Ranks) -> None:
    """Tokens of some text, with a tokenizer that is trained on it."""
    text = folder.parent / "text"
    text.mkdir(exist_ok=True)
    for number in range(30):
        words = [f"w{(number * 7 + i * i) % 97}" for i in range(200)]
        (text / f"{number:02}.txt").write_text(" ".join(words))
    prepare_tokens(str(text), vocab_size=270, sequence_length=S, folder=folder)


def prepare_results(folder: Path) -> dict[str, bytes]:
    """What must be equal of prepared tokens."""
    found = (path for path in folder.rglob("*") if path.is_file() and "MANIFEST" not in path.name)
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


def subject_work(folder: Path, _: Ranks) -> None:
    """A subject, trained."""
    train_subject(SUBJECT, blocks(96, 1), blocks(24, 2), folder=folder, quiet=True)


def subject_results(folder: Path) -> dict[str, bytes]:
    """What must be equal of a subject: weights of every checkpoint, and losses."""
    found = {path.parent.name: path.read_bytes() for path in folder.rglob("model.safetensors")}
    return found | {"losses": json.dumps(json.loads((folder / "run.json").read_text())["checkpoints"]).encode()}


def cell_work(folder: Path, _: Ranks) -> None:
    """A cell of a study, measured on a store."""
    for name, one in (("train", blocks(96, 1)), ("held_out", blocks(80, 2))):
        write_shards(harvester(), one, folder / name)
    budget = DictionaryBudget(n_features=24, k_crosscoder=4, k_layerwise=3, steps=STEPS, batch=64)
    cell = Cell(subject="S", state="trained", site="residual", arm="crosscoder", role="main", budget=budget)
    measure = partial(cell.measure, Stores(folder / "train", folder / "held_out"), folder)
    (folder / "cells").mkdir(exist_ok=True)
    if not (folder / "cells" / "one.json").is_file():
        _keep(measure, folder / "cells" / "one.json", folder / "unfinished" / cell.name)


def cell_results(folder: Path) -> dict[str, bytes]:
    """What must be equal of a cell: its rows."""
    return {"rows": (folder / "cells" / "one.json").read_bytes()}


ARMS, SELECTIONS, SOURCES = ("crosscoder", "layerwise"), ("topk", "batch_topk"), ("live", "store")
CELLS: dict[str, Work] = {
    " ".join(parts): partial(train_cell, *parts) for parts in itertools.product(ARMS, SELECTIONS, SOURCES)
}
SCENARIOS = {
    "refill": (CELLS["crosscoder batch_topk live"], train_results),
    "shard": (CELLS["crosscoder batch_topk store"], train_results),
    "prepare": (prepare_work, prepare_results),
    "subject": (subject_work, subject_results),
    "cell": (cell_work, cell_results),
}
"""By the first word of a point that it reaches; any other is reached by the first."""


def kind_of(point: str) -> str:
    """The scenario that reaches a point."""
    first = point.split(".")[0]
    return first if first in SCENARIOS else next(iter(SCENARIOS))
