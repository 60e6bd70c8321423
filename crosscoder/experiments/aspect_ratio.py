"""The main job: two transformers of equal parameters and unequal shape, their features counted per layer and across.

Subject A has L layers of width d, subject B L/4 layers of width 2d. Both are trained on the same tokens and the pair
of checkpoints with the same held-out loss is taken. On the residual stream and on the block writes of both, and of
both untrained, a per-layer bank and a crosscoder are trained with every seed and counted. Every stage keeps its
result in the study's folder, so a study that was stopped goes on where it was.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
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
from crosscoder.experiments.budget import Arm, DictionaryBudget, with_k, with_size
from crosscoder.experiments.cells import Cell, Role, Site, State, Stores
from crosscoder.experiments.presets import StudyConfig, SubjectsConfig
from crosscoder.experiments.stages import Clock, run_cells, save_splice_ids
from crosscoder.experiments.workers import run_jobs
from crosscoder.foundation.artifact import read_json
from crosscoder.foundation.config import to_mapping
from crosscoder.foundation.console import say

LOSS_GAP = 0.01  # held-out losses further apart than this are not called matched
STATES: tuple[State, ...] = ("trained", "untrained")
SITES: tuple[Site, ...] = ("residual", "write")
ARMS: tuple[Arm, ...] = ("crosscoder", "layerwise")


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
    clock = Clock()
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
        run_cells(cells, wanted, stores, folder, device, workers)
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


def study_cells(config: StudyConfig) -> list[Cell]:
    """Every cell of the study, the ones that take longest first."""
    budget = config.dictionaries
    cells = [
        Cell(subject=s, state=state, site=site, arm=arm, role="main", budget=budget, seeds=config.seeds)
        for s in config.subjects.shapes()
        for state in STATES
        for site in SITES
        for arm in ARMS
    ]
    variants: list[tuple[Role, DictionaryBudget]] = [
        ("size", with_size(budget, n)) for n in config.sizes if n != budget.n_features
    ]
    variants += [("k", with_k(budget, factor)) for factor in config.k_factors if factor != 1]
    cells += [
        Cell(subject=s, state="trained", site="residual", arm=arm, role=role, budget=b, seeds=config.seeds[:1])
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
    stores: dict[tuple[str, str], Stores] = {}
    jobs: dict[str, Callable[[], Any]] = {}
    (folder / "activations").mkdir(exist_ok=True)
    ids = save_splice_ids(tokens.held_out, folder / "activations", config.splice_blocks)
    for name, run in runs.items():
        for state in STATES:
            index = pair.index[name] if state == "trained" else 0
            checkpoint = run.folder / run.checkpoints[index].folder
            homes = {split: folder / "activations" / f"{name}-{state}-{split}" for split in ("train", "held_out")}
            splice = state == "trained" and ids is not None
            stores[name, state] = Stores(
                train=homes["train"],
                held_out=homes["held_out"],
                subject=checkpoint if splice else None,
                held_out_ids=ids if splice else None,
            )
            for split, home in homes.items():
                if not home.is_dir():
                    jobs[home.name] = partial(_harvest_one, checkpoint, folder / "tokens", home, config, split, device)
    run_jobs(jobs, workers=workers, device=device, label="activations")
    for store in stores.values():
        ActivationShards.load(store.train)  # hashes are checked once here, and not again by every cell
        ActivationShards.load(store.held_out)
    return stores


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
        assembly.matched_item("norm parameters", both(lambda s: s["parameters"]["norms"]), False, "not counted in N"),
        assembly.matched_item(
            "total neurons L * D",
            both(lambda s: s["total_neurons"]),
            False,
            "the question itself: equal parameters, half the neurons",
        ),
        assembly.matched_item(
            "training seeds",
            both(lambda _: 1),
            True,
            "one trained subject of each shape: intervals below cover dictionary seeds, not training seeds",
        ),
    ]
