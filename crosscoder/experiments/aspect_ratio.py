"""The main job: transformers of equal parameters and unequal shape, their features counted per layer and across.

Subject A has L layers of width d, subject B L/4 layers of width 2d, C lies between. Each is trained with several seeds
on the same text, and checkpoints with the same held-out loss are taken. On the residual stream and on the block writes,
of the trained and of the untrained subjects, dictionaries are trained with every seed and counted; the rule then says
what the densities mean. Every stage keeps its result in the study's folder, so a study that was stopped goes on where
it was.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

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
from crosscoder.experiments import assembly, judgement
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
SITES: tuple[Site, ...] = ("write", "residual")
COMPARED = ("A", "B")
Run = tuple[str, int]  # a shape and the position of its training seed


@dataclass(frozen=True)
class MatchedRuns:
    """One checkpoint of every run, so that all held-out losses agree as well as can be, as late as can be."""

    index: dict[Run, int]
    checkpoints: dict[Run, SubjectCheckpoint]
    gap: float  # largest less smallest loss, over their mean

    @property
    def matched(self) -> bool:
        """Whether the gap is within the limit."""
        return self.gap <= LOSS_GAP


def match_losses(runs: Mapping[Run, Sequence[SubjectCheckpoint]]) -> MatchedRuns:
    """Among choices within half the allowed gap the one with the lowest loss; without any, the closest.

    For every loss that some checkpoint has, each run offers the checkpoint nearest to it. The initial weights (the
    first checkpoint of each) take no part.
    """
    losses = {run: np.array([c.held_out_loss for c in found[1:]]) for run, found in runs.items()}
    choices = []
    for target in sorted(set(np.concatenate(list(losses.values())).tolist())):
        index = {run: int(np.abs(values - target).argmin()) for run, values in losses.items()}
        chosen = np.array([losses[run][i] for run, i in index.items()])
        choices.append((float(np.ptp(chosen) / chosen.mean()), float(chosen.mean()), index))
    close = [choice for choice in choices if choice[0] <= LOSS_GAP / 2]
    gap, _, index = min(close, key=lambda c: c[1]) if close else min(choices, key=lambda c: c[0])
    found = {run: i + 1 for run, i in index.items()}
    return MatchedRuns(found, {run: runs[run][i] for run, i in found.items()}, gap)


def run_study(
    config: StudyConfig, *, folder: Path, preset: str, device: str = "cpu", workers: int = 2
) -> dict[str, Any]:
    """The study's results (docs/results.md); every stage is kept under `folder` and not run twice."""
    folder.mkdir(parents=True, exist_ok=True)
    clock = Clock()
    tokens = _tokens(config.subjects, folder)
    clock.lap("tokens")
    runs = _subjects(config.subjects, tokens, folder, device, workers)
    matched = match_losses({run: found.checkpoints for run, found in runs.items()})
    said = [f"{name}{t} {c.held_out_loss:.4f} after {c.tokens:,}" for (name, t), c in matched.checkpoints.items()]
    say(f"matched checkpoints, nats/token after tokens: {', '.join(said)}; gap {matched.gap:.2%}")
    clock.lap("subjects")
    cells = study_cells(config)
    wanted = {cell.name: folder / "cells" / f"{cell.name}.json" for cell in cells}
    if not all(path.is_file() for path in wanted.values()):
        stores = _stores(config, tokens, runs, matched, folder, device, workers)
        clock.lap("activations")
        run_cells(cells, wanted, stores, folder, device, workers)
        if not config.keep_activations:
            shutil.rmtree(folder / "activations", ignore_errors=True)
    clock.lap("dictionaries")
    results = [read_json(path) for path in wanted.values()]
    subjects = {
        name: _describe_subject(name, config, runs, matched, tokens, device) for name in config.subjects.shapes()
    }
    gap = _gap([loss for subject in subjects.values() for loss in _losses(subject)])
    calibration = judgement.calibrate_study(config, folder, device=device, workers=workers)
    clock.lap("calibration")
    judged = judgement.judge(config, results, folder, calibration, loss_gap=gap, loss_matched=matched.matched)
    clock.lap("verdict")
    return assembly.assemble(
        results,
        subjects=subjects,
        matched=_matched_items(config, matched, subjects, tokens),
        judged=judged,
        config=to_mapping(config),
        kind="aspect_ratio",
        preset=preset,
        seconds=clock.seconds,
        text=config.subjects.text,
        tokens_fingerprint=tokens.train.fingerprint,
    )


def study_cells(config: StudyConfig) -> list[Cell]:
    """Every cell of the study, the ones that take longest first.

    Crosscoders of every training run decide; banks are trained on the first run of A and B, and with several k on the
    block writes of every run of A, for the count gain. The shuffled control is A's, on the block writes.
    """
    shapes = config.subjects.shapes()
    every = range(len(config.subjects.seeds))
    cells: list[Cell] = []

    def add(
        name: str, t: int, state: State, site: Site, arm: Arm, role: Role, budget: DictionaryBudget, seeds=config.seeds
    ) -> None:
        cells.append(
            Cell(subject=name, training_seed=t, state=state, site=site, arm=arm, role=role, budget=budget, seeds=seeds)
        )

    for name, shape in shapes.items():
        budget = shape.budget(config.dictionaries)
        compared = name in COMPARED
        for t in every:
            for site in SITES:
                add(name, t, "trained", site, "crosscoder", "main", budget)
                if compared:
                    add(name, t, "untrained", site, "crosscoder", "main", budget)
                if compared and t == 0:
                    add(name, t, "trained", site, "layerwise", "main", budget)
            if name == "A":
                add(name, t, "shuffled", "write", "crosscoder", "main", budget, config.seeds[:1])
        if compared:
            for role, variant in _variants(config, budget):
                add(name, 0, "trained", "write", "crosscoder", role, variant, config.seeds[:1])
    budget = config.subjects.a.budget(config.dictionaries)
    for t in every:
        for factor in sorted({1.0, *config.k_factors}):
            if not (t == 0 and factor == 1):  # that one is a main cell
                add("A", t, "trained", "write", "layerwise", "k", with_k(budget, factor), config.seeds[:1])

    def cost(cell: Cell) -> int:
        layers = shapes[cell.subject].n_layers
        return len(cell.seeds) * cell.budget.n_features * layers * (2 if cell.arm == "layerwise" else 1)

    return sorted(cells, key=cost, reverse=True)


def _variants(config: StudyConfig, budget: DictionaryBudget) -> list[tuple[Role, DictionaryBudget]]:
    variants: list[tuple[Role, DictionaryBudget]] = [
        ("size", with_size(budget, n)) for n in config.sizes if n != budget.n_features
    ]
    return variants + [("k", with_k(budget, factor)) for factor in config.k_factors if factor != 1]


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
) -> dict[Run, SubjectRun]:
    runs = config.runs()
    homes = {(name, t): folder / "subjects" / f"{name}{t}" for name, t in runs}
    jobs: dict[str, Callable[[], Any]] = {
        homes[run].name: partial(_train_one, training, folder / "tokens", homes[run], device)
        for run, training in runs.items()
        if not (homes[run] / "run.json").is_file()
    }
    if jobs:
        say(f"training subjects {', '.join(jobs)} on a text of {tokens.train.n_tokens:,} tokens")
        run_jobs(jobs, workers=workers, device=device, label="subjects")
    return {run: SubjectRun.load(home) for run, home in homes.items()}


def _harvest_one(checkpoint: Path, tokens: Path, folder: Path, config: StudyConfig, split: str, device: str) -> None:
    blocks = TokenBlocks.load(tokens / split)
    harvester = ResidualHarvester(load_checkpoint(checkpoint, device=device))
    budget = config.tokens_train if split == "train" else config.tokens_held_out
    write_shards(harvester, blocks, folder, max_tokens=budget, metadata={"subject": checkpoint.name})


def _stores(
    config: StudyConfig,
    tokens: PreparedTokens,
    runs: dict[Run, SubjectRun],
    matched: MatchedRuns,
    folder: Path,
    device: str,
    workers: int,
) -> dict[tuple[str, int, str], Stores]:
    """Activations of every run, and of A and B untrained, for training and held out."""
    stores: dict[tuple[str, int, str], Stores] = {}
    jobs: dict[str, Callable[[], Any]] = {}
    (folder / "activations").mkdir(exist_ok=True)
    ids = save_splice_ids(tokens.held_out, folder / "activations", config.splice_blocks)
    for (name, t), run in runs.items():
        for state in STATES if name in COMPARED else STATES[:1]:
            index = matched.index[name, t] if state == "trained" else 0
            checkpoint = run.folder / run.checkpoints[index].folder
            homes = {split: folder / "activations" / f"{name}{t}-{state}-{split}" for split in ("train", "held_out")}
            splice = state == "trained" and ids is not None and t == 0
            stores[name, t, state] = Stores(
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


def _describe_subject(
    name: str,
    config: StudyConfig,
    runs: dict[Run, SubjectRun],
    matched: MatchedRuns,
    tokens: PreparedTokens,
    device: str,
) -> dict[str, Any]:
    """One shape: sizes, and the losses of all its training runs; curve and text of the first."""
    run, checkpoint = runs[name, 0], matched.checkpoints[name, 0]
    stride = max(1, len(tokens.held_out) // 256)
    rows = []
    for t, seed in enumerate(config.subjects.seeds):
        model = runs[name, t].load_model(matched.index[name, t])
        rows.append(
            {
                "seed": seed,
                "held_out_loss": held_out_loss(model, tokens.held_out[::stride]),
                "tokens": matched.checkpoints[name, t].tokens,
                "untrained_loss": runs[name, t].checkpoints[0].held_out_loss,
            }
        )
    counts = count_parameters(run.load_model(matched.index[name, 0]))
    shape = run.config
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
        "held_out_loss": float(np.mean([row["held_out_loss"] for row in rows])),
        "held_out_loss_unit": "nats/token",
        "tokens": round(np.mean([row["tokens"] for row in rows])),
        "epochs": run.epochs * checkpoint.tokens / run.checkpoints[-1].tokens,
        "curve": [{"step": c.step, "tokens": c.tokens, "held_out_loss": c.held_out_loss} for c in run.checkpoints[1:]],
        "runs": rows,
        "untrained_loss": run.checkpoints[0].held_out_loss,
        "description": f"Llama-style decoder, {shape.n_layers} layers of width {shape.d_model}, vocabulary "
        f"{tokens.train.vocab_size}, context {shape.context}, learning rate {shape.learning_rate:g}; trained with "
        f"seeds {', '.join(map(str, config.subjects.seeds))}",
    }


def _losses(subject: dict[str, Any]) -> list[float]:
    return [row["held_out_loss"] for row in subject["runs"]]


def _gap(losses: Sequence[float]) -> float:
    return float(np.ptp(losses) / np.mean(losses))


def _matched_items(
    config: StudyConfig, matched: MatchedRuns, subjects: dict[str, Any], tokens: PreparedTokens
) -> list[dict[str, Any]]:
    """What of the subjects was made equal, and what was not; dictionaries are added from their results."""

    def both(function: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
        return {name: function(subject) for name, subject in subjects.items()}

    gap = _gap([loss for subject in subjects.values() for loss in _losses(subject)])
    parameters = both(lambda s: s["parameters"]["non_embedding"])
    seen = both(lambda s: s["tokens"])
    return [
        assembly.matched_item(
            "non-embedding parameters",
            parameters,
            max(parameters.values()) <= 1.02 * min(parameters.values()),
            "matrices of the blocks; 12 L d^2 to within rounding of the widths; C's width is rounded to an even head",
        ),
        assembly.matched_item(
            "held-out loss, nats/token",
            both(lambda s: s["held_out_loss"]),
            gap <= LOSS_GAP,
            f"means over training seeds; largest gap of any two runs {gap:.2%} on a larger held-out sample, "
            f"{matched.gap:.2%} where checkpoints were chosen; limit {LOSS_GAP:.0%}",
        ),
        assembly.matched_item(
            "training tokens at the matched checkpoint",
            seen,
            len(set(seen.values())) == 1,
            "means over training seeds; equal loss does not hold at equal tokens, so checkpoints are matched by loss; "
            "earlier ones were taken before their learning rate had fallen as far",
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
            both(lambda s: len(s["runs"])),
            True,
            "trainings of each shape; intervals of the verdict cover them, ranges in the tables below too",
        ),
    ]
