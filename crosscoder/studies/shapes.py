"""The main job: transformers of equal parameters and unequal shape, their features counted per layer and across.

Subject A has L layers of width d, subject B L/4 layers of width 2d, C lies between. Each is trained with several seeds
on the same text, and checkpoints with the same held-out loss are taken. On the residual stream and on the block writes,
of the trained and of the untrained subjects, dictionaries are trained with every seed and counted; the rule then says
what the densities mean. Every stage keeps its result in the study's folder, so a study that was stopped goes on where
it was.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from crosscoder.data.prepared import PreparedTokens, prepare_tokens
from crosscoder.data.residuals import ResidualHarvester
from crosscoder.data.shards import ActivationShards, write_shards
from crosscoder.data.subject_training import (
    SubjectConfig,
    SubjectRun,
    load_checkpoint,
    train_subject,
)
from crosscoder.data.tokens import TokenBlocks
from crosscoder.foundation.artifact import read_json
from crosscoder.foundation.config import to_mapping
from crosscoder.foundation.console import say
from crosscoder.studies import answer as assembly
from crosscoder.studies import judge as judgement
from crosscoder.studies import matched as matched_runs
from crosscoder.studies.budget import Arm, DictionaryBudget, with_k, with_size
from crosscoder.studies.cells import Cell, Role, Site, State, Stores
from crosscoder.studies.folder import Clock, run_cells, run_joints, save_splice_ids
from crosscoder.studies.joint import JointCell
from crosscoder.studies.matched import MatchedRuns, OtherPartsError, Part, Run
from crosscoder.studies.presets import StudyConfig, SubjectsConfig
from crosscoder.studies.workers import run_jobs

STATES: tuple[State, ...] = ("trained", "untrained")
SITES: tuple[Site, ...] = ("write", "residual")
COMPARED = ("A", "B")


def run_study(
    config: StudyConfig, *, folder: Path, preset: str, device: str = "cpu", workers: int = 2, part: Part | None = None
) -> dict[str, Any]:
    """The study's results (docs/results.md); every stage is kept under `folder` and not run twice.

    Raises:
        OtherPartsError: `part` is not the whole study, and other parts are not done yet.
    """
    part = part or Part()
    folder.mkdir(parents=True, exist_ok=True)
    clock = Clock()
    tokens = _tokens(config.subjects, folder)
    clock.lap("tokens")
    runs = _subjects(config.subjects, tokens, folder, device, workers, part)
    chosen = matched_runs.match_losses({run: found.checkpoints for run, found in runs.items()})
    said = [f"{name}{t} {c.held_out_loss:.4f} after {c.tokens:,}" for (name, t), c in chosen.checkpoints.items()]
    say(f"matched checkpoints, nats/token after tokens: {', '.join(said)}; gap {chosen.gap:.2%}")
    clock.lap("subjects")
    cells, joints = study_cells(config), study_joints(config)
    wanted = {cell.name: folder / "cells" / f"{cell.name}.json" for cell in [*cells, *joints]}
    own = [cell for cell in cells if part.holds((cell.subject, cell.training_seed), list(runs))]
    own_joints = [cell for cell in joints if part.holds(cell.first, list(runs))]
    if not all(wanted[cell.name].is_file() for cell in [*own, *own_joints]):
        seconds = {cell.second for cell in own_joints}
        mine = {run: found for run, found in runs.items() if run in seconds or part.holds(run, list(runs))}
        stores = _stores(config, tokens, mine, chosen, folder, device, workers)
        clock.lap("activations")
        run_cells(own, wanted, stores, folder, device, workers)
        run_joints(own_joints, wanted, stores, device, workers)
        if not config.keep_activations:
            for name, t in mine:
                for home in (folder / "activations").glob(f"{name}{t}-*"):
                    shutil.rmtree(home, ignore_errors=True)
    clock.lap("dictionaries")
    left = sum(not path.is_file() for path in wanted.values())
    if left:
        raise OtherPartsError(f"this part is done; {left} of {len(wanted)} cells are left for other parts")
    results = [read_json(wanted[cell.name]) for cell in cells]
    joint = [read_json(wanted[cell.name]) for cell in joints]
    subjects = {
        name: matched_runs.describe_subject(name, config, runs, chosen, tokens) for name in config.subjects.shapes()
    }
    gap = matched_runs.relative_gap([loss for subject in subjects.values() for loss in matched_runs.losses(subject)])
    calibration = judgement.calibrate_study(config, folder, device=device, workers=workers)
    clock.lap("calibration")
    judged = judgement.judge(
        config, results, folder, calibration, joint=joint, loss_gap=gap, loss_matched=chosen.matched
    )
    clock.lap("verdict")
    return assembly.assemble(
        results,
        subjects=subjects,
        matched=matched_runs.matched_items(config, chosen, subjects, tokens),
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
        # X is A's, beside its controls; leaving its features out of R needs those of trained B too.
        probed = site == "write" and arm == "crosscoder" and role == "main"
        probed = probed and (name == "A" or (name, state) == ("B", "trained"))
        where = {"subject": name, "training_seed": t, "state": state, "site": site}
        cells.append(Cell(**where, arm=arm, role=role, budget=budget, seeds=seeds, probed=probed))

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


def study_joints(config: StudyConfig) -> list[JointCell]:
    """Crosscoders over two subjects, on the block writes: A and B of each training seed, two trainings of A, and A and
    B untrained. The last two have every dictionary seed, since they have one pair of runs."""
    if not config.joint:
        return []
    budget = config.subjects.a.budget(config.dictionaries)

    def cell(first: Run, second: Run, state: State = "trained", seeds: tuple[int, ...] = config.seeds) -> JointCell:
        return JointCell(first=first, second=second, state=state, site="write", budget=budget, seeds=seeds)

    every = range(len(config.subjects.seeds))
    cells = [cell(("A", t), ("B", t), seeds=config.seeds[:1]) for t in every]
    if len(every) > 1:
        cells.append(cell(("A", 0), ("A", 1)))
    return [*cells, cell(("A", 0), ("B", 0), "untrained")]


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
    config: SubjectsConfig, tokens: PreparedTokens, folder: Path, device: str, workers: int, part: Part
) -> dict[Run, SubjectRun]:
    runs = config.runs()
    homes = {(name, t): folder / "subjects" / f"{name}{t}" for name, t in runs}
    jobs: dict[str, Callable[[], Any]] = {
        homes[run].name: partial(_train_one, training, folder / "tokens", homes[run], device)
        for run, training in runs.items()
        if part.holds(run, list(runs)) and not (homes[run] / "run.json").is_file()
    }
    if jobs:
        say(f"training subjects {', '.join(jobs)} on a text of {tokens.train.n_tokens:,} tokens")
        run_jobs(jobs, workers=workers, device=device, label="subjects")
    left = [home.name for home in homes.values() if not (home / "run.json").is_file()]
    if left:
        raise OtherPartsError(f"this part's subjects are trained; {', '.join(left)} are left for other parts")
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
