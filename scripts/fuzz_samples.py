"""A small sample of everything that is read from disk, and the loader of each: what `fuzz.py` damages."""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from crosscoder import BatchTopK, Crosscoder, JumpReLU, LayerwiseSAE, TopK, load_dictionary
from crosscoder.data.residuals import ResidualHarvester
from crosscoder.data.shards import ActivationShards, write_shards
from crosscoder.data.subject import build_subject, load_subject, model_origin
from crosscoder.data.subject_training import SubjectConfig, SubjectRun, load_checkpoint, train_subject
from crosscoder.data.text import Documents
from crosscoder.data.tokenizer import train_tokenizer
from crosscoder.data.tokens import PreparedTokens, TokenBlocks
from crosscoder.foundation.artifact import MANIFEST, read_json
from crosscoder.foundation.config import from_mapping, to_mapping
from crosscoder.foundation.tensors import load_tensors, save_tensors
from crosscoder.measure.reading import load_reading, read_dictionary, save_reading
from crosscoder.results.file import load_results, read_results, read_rows, save_results, write_rows
from crosscoder.studies.folder import require_inputs
from crosscoder.studies.presets import PRESETS, StudyConfig
from crosscoder.training import TrainConfig, train
from crosscoder.training.checkpoint import fault_of, latest_checkpoint
from crosscoder.training.checkpoint import load_checkpoint as load_training
from crosscoder.training.history import read_history
from crosscoder.training.state import TrainState

ROOT = Path(__file__).parents[1]
SIZES: dict[str, Any] = {"n_layers": 2, "d_model": 4, "n_features": 8}
TEXT = "the cat sat on a mat and saw one dog run past two old red barns by a slow wide river in the rain "


@dataclass(frozen=True)
class Sample:
    """Files of one kind, how they are read, and how often they are damaged beside others: slow loaders seldom."""

    name: str
    folder: Path
    load: Callable[[], object]
    weight: float = 1.0
    sealed: bool = True
    """Whether the files carry hashes, so that a change is to be found."""
    files: tuple[str, ...] = ()
    """Those that are damaged; all by default."""

    def chosen(self) -> list[Path]:
        """Paths of the files that are damaged."""
        if self.files:
            return [self.folder / name for name in self.files]
        return sorted(path for path in self.folder.rglob("*") if path.is_file())


def make_samples(root: Path, kinds: Sequence[str] = ()) -> list[Sample]:
    """One sample of every kind in `root`; of some kinds only if they are named."""
    makers = (_dictionaries, _runs, _tokens, _stores, _subjects, _studies, _configs, _texts)
    return [sample for make in makers for sample in make(root) if not kinds or sample.name in kinds]


def _dictionaries(root: Path) -> list[Sample]:
    cc = Crosscoder(**SIZES, sparsity=BatchTopK(k=2))
    cc(torch.randn(32, 2, 4))
    bank = LayerwiseSAE(**SIZES, sparsity=JumpReLU(), decoder="free")
    found = []
    for name, dictionary in (("crosscoder", cc), ("bank", bank)):
        dictionary.save_pretrained(root / name)
        found.append(Sample(name, root / name, lambda at=root / name: load_dictionary(at)))
    shutil.copytree(root / "bank", root / "without manifest")
    (root / "without manifest" / MANIFEST).unlink()
    at = root / "without manifest"
    return [*found, Sample("dictionary without manifest", at, lambda: load_dictionary(at), sealed=False)]


def _runs(root: Path) -> list[Sample]:
    folder = root / "run"
    config = TrainConfig(steps=4, checkpoint_every=4, log_every=1)
    batches = [torch.randn(16, 2, 4, generator=torch.Generator().manual_seed(i)) for i in range(4)]
    train(Crosscoder(**SIZES, sparsity=TopK(k=2)), batches, config=config, folder=folder, quiet=True)
    path = latest_checkpoint(folder / "checkpoints")
    assert path is not None

    def resume() -> None:
        if fault := fault_of(path):
            raise ValueError(fault)
        load_training(path, TrainState.start(Crosscoder(**SIZES, sparsity=TopK(k=2))))
        read_history(path, folder / "metrics.jsonl", 4)

    old = root / "old run" / path.name
    shutil.copytree(path, old)
    (old / "metrics.jsonl").unlink()
    (old / MANIFEST).write_text(json.dumps({"files": {}, "schema": ""}))
    shutil.copy(folder / "metrics.jsonl", old.parent)
    live = old.parent / "metrics.jsonl"
    return [
        Sample("checkpoint", path, resume),
        Sample("metrics", old.parent, lambda: read_history(old, live, 4), sealed=False, files=("metrics.jsonl",)),
    ]


def _tokens(root: Path) -> list[Sample]:
    texts = [TEXT * 3 for _ in range(8)]
    tokenizer = train_tokenizer(texts, vocab_size=270)
    ids = np.array(tokenizer(TEXT * 20)["input_ids"][:320], dtype=np.int32).reshape(20, 16)
    parts = [TokenBlocks(part, vocab_size=270, documents=np.arange(len(part)) // 2) for part in (ids[:14], ids[14:])]
    from crosscoder.data.tokenizer import tokenizer_hash

    for part in parts:
        part.tokenizer_hash = tokenizer_hash(tokenizer)
    home = root / "tokens"
    PreparedTokens(train=parts[0], held_out=parts[1], tokenizer=tokenizer).save(home)
    return [
        Sample("tokens", home / "train", lambda: TokenBlocks.load(home / "train")),
        Sample("tokenizer", home / "tokenizer", lambda: PreparedTokens.load(home), 0.1),
    ]


def _stores(root: Path) -> list[Sample]:
    blocks = TokenBlocks.load(root / "tokens" / "train")
    model = build_subject(2, 8, vocab_size=270, context=16, head_dim=4, seed=0).eval().requires_grad_(False)
    harvester = ResidualHarvester(model, origin=model_origin(model, "tiny"))
    write_shards(harvester, blocks, root / "store", tokens_per_shard=64)

    def read() -> None:
        store = ActivationShards.load(root / "store")
        store.epoch_rows(0, min(8, store.n_tokens), seed=0, epoch=0)

    return [Sample("store", root / "store", read)]


def _subjects(root: Path) -> list[Sample]:
    prepared = PreparedTokens.load(root / "tokens")
    config = SubjectConfig(n_layers=1, d_model=8, head_dim=4, context=16, batch=2, tokens=64, n_checkpoints=1)
    run = train_subject(
        config, prepared.train, prepared.held_out, folder=root / "subject", tokenizer=prepared.tokenizer, quiet=True
    )
    step = root / "subject" / run.checkpoints[-1].folder
    loads = (lambda: load_checkpoint(step), lambda: load_subject(step))
    return [
        Sample("subject run", root / "subject", lambda: SubjectRun.load(root / "subject"), files=("run.json",)),
        Sample("subject", step, loads[0], 0.03),
        Sample("subject and tokenizer", step, loads[1], 0.02),
    ]


def _studies(root: Path) -> list[Sample]:
    home = root / "study"
    home.mkdir()
    unsealed = ROOT / "benchmarks" / "smollm2-135m" / "results.json"
    save_results(read_results(unsealed), home)
    write_rows(home / "cell.json", list(load_results(home).rows)[:40])
    cc = Crosscoder(**SIZES, sparsity=TopK(k=2))
    save_reading(read_dictionary(cc, [torch.randn(64, 2, 4)]), home / "reading.safetensors")
    save_tensors({"ids": torch.arange(6).view(2, 3), "blocks": torch.arange(2)}, home / "ids.safetensors")
    (home / "tokens" / "held_out").mkdir(parents=True)
    require_inputs_of = lambda: require_inputs(home, text="a" * 64)
    require_inputs_of(), (home / "tokens" / "held_out" / ".kept").write_text("")
    old = root / "old study"
    old.mkdir()
    shutil.copy(unsealed, old)
    return [
        Sample("results", home, lambda: load_results(home), 0.5, files=("results.json",)),
        Sample("results of 0.2", old, lambda: load_results(old), 0.3, sealed=False),
        Sample("cell", home, lambda: read_rows(home / "cell.json"), files=("cell.json",)),
        Sample("reading", home, lambda: load_reading(home / "reading.safetensors"), files=("reading.safetensors",)),
        Sample("tensors", home, lambda: load_tensors(home / "ids.safetensors"), files=("ids.safetensors",)),
        Sample("inputs", home, require_inputs_of, files=("inputs.json",)),
    ]


def _configs(root: Path) -> list[Sample]:
    home = root / "configs"
    home.mkdir()
    settings = {"study": (StudyConfig, PRESETS["smoke"]), "training": (TrainConfig, TrainConfig())}
    found = []
    for name, (kind, config) in settings.items():
        path = home / f"{name}.json"
        path.write_text(json.dumps(to_mapping(config), indent=1))
        load = lambda kind=kind, path=path: from_mapping(kind, read_json(path))
        found.append(Sample(f"{name} config", home, load, sealed=False, files=(path.name,)))
    return found


def _texts(root: Path) -> list[Sample]:
    import pyarrow as pa
    from pyarrow import parquet

    home = root / "texts"
    home.mkdir()
    rows = [{"text": TEXT, "n": i} for i in range(6)]
    (home / "a.txt").write_text(TEXT * 20)
    (home / "b.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (home / "c.txt.gz").write_bytes(gzip.compress((TEXT * 20).encode()))
    parquet.write_table(pa.table({"text": [TEXT] * 6}), home / "d.parquet")
    return [
        Sample(f"text {path.suffix}", home, lambda path=path: [*Documents(str(path))], sealed=False, files=(path.name,))
        for path in sorted(home.iterdir())
    ]
