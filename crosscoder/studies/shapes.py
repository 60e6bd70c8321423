"""The main job: transformers of equal parameters and unequal shape, their features counted per layer and across.

Subject A has L layers of width d, subject B L/4 layers of width 2d, C lies between. Each is trained with several seeds
on the same text, and checkpoints with the same held-out loss are taken. On the residual stream and on the block writes,
of the trained and of the untrained subjects, dictionaries are trained with every seed and counted; the rule then says
what the densities mean. Every stage keeps its result in the study's folder, so a study that was stopped goes on where
it was.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from crosscoder.data.residuals import ResidualHarvester
from crosscoder.data.subject_training import (
    SubjectCheckpoint,
    SubjectConfig,
    SubjectRun,
    held_out_loss,
    load_checkpoint,
    train_subject,
)
from crosscoder.data.tokens import PreparedTokens
from crosscoder.foundation.console import say
from crosscoder.results.file import Results
from crosscoder.results.table import COMPARED, SITES, LongTable, Place, Row, State, rows_at
from crosscoder.studies import judge
from crosscoder.studies.baselines import LOSS_BLOCKS, baseline_rows, evenly
from crosscoder.studies.budget import CLASSES, SPANNING, of_other_k, with_size
from crosscoder.studies.calibration import calibrate_study
from crosscoder.studies.cells import Cell, Stores, Streamed
from crosscoder.studies.folder import STATES, StoresOf, StudyFolder, harvest_into, parameter_counts
from crosscoder.studies.inputs import require_inputs, text_hash
from crosscoder.studies.presets import Run, StudyConfig, SubjectsConfig
from crosscoder.verdict.rule import RULE


def run_study(
    config: StudyConfig, *, folder: Path, preset: str, device: str = "cpu", workers: int = 2, part: Part | None = None
) -> Results:
    """The study's results; every stage is kept under `folder` and not run twice.

    Raises:
        OtherPartsError: `part` is not the whole study, and other parts are not done yet.
    """
    part, subjects = part or Part(), config.subjects
    text, study = text_hash(subjects.text), StudyFolder(folder, device=device, workers=workers)
    require_inputs(folder, text=text)
    of_text = {"vocab_size": subjects.vocab_size, "sequence_length": subjects.context, "seed": subjects.seed}
    tokens = study.tokens(subjects.text, **of_text)
    study.lap("tokens")
    runs = _train_subjects(subjects, study, part)
    chosen = match_losses({run: found.checkpoints for run, found in runs.items()})
    said = [f"{name}{t} {c.held_out_loss:.4f} after {c.tokens:,}" for (name, t), c in chosen.checkpoints.items()]
    say(f"matched checkpoints, nats/token after tokens: {', '.join(said)}; gap {chosen.gap:.2%}")
    study.lap("subjects")
    cells = study_cells(config)
    own = [cell for cell in cells if part.holds(cell.runs[0], list(runs))]
    read = {run for cell in own for run in cell.runs}
    harvest = partial(_harvest, config, study, {run: runs[run] for run in runs if run in read}, chosen, tokens)
    study.run_cells(own, harvest, keep_activations=config.keep_activations)
    if left := study.left(cells):
        raise OtherPartsError(f"this part is done; {len(left)} of {len(cells)} cells are left for other parts")
    rows = [row for name in subjects.shapes() for row in subject_rows(name, config, runs, chosen, tokens)]
    rows += baseline_rows(study, runs, chosen.index)
    study.lap("baselines")
    gap = relative_gap(LongTable(tuple(rows)).values("held_out_loss"))
    further = {"vocabulary": tokens.train.vocab_size, "text_tokens": tokens.train.n_tokens}
    rows += rows_at(Place(), {"loss_gap": gap, "chosen_loss_gap": chosen.gap, **further})
    rows += [*study.rows(cells), *calibrate_study(config, study)]
    study.lap("calibration")
    measured, verdict = judge.judge(config, LongTable(tuple(rows)), folder, loss_gap=gap, loss_matched=chosen.matched)
    study.lap("verdict")
    rows += measured
    return study.results(
        rows, verdict, config=config, tokens=tokens, kind="aspect_ratio", preset=preset, text=subjects.text
    )


def study_cells(config: StudyConfig) -> list[Cell]:
    """Every cell of the study, the ones that take longest first.

    Crosscoders of every training run decide; on the trained block writes of A and B each has others of several k beside
    it, and so have the banks there, so that loads can be read at common fidelity. Banks of the residual stream and
    sizes are those of the first run. The shuffled control is A's, on the block writes. Joint crosscoders, if there are
    to be any, come last.
    """
    budgets = {name: shape.budget(config.dictionaries) for name, shape in config.subjects.shapes().items()}
    where: dict[str, Any] = {"state": "trained", "site": "write", "role": "main", "seeds": config.seeds}
    mains = {name: Cell(subject=name, arm="crosscoder", budget=budgets[name], **where) for name in budgets}
    every, first, cells = range(len(config.subjects.seeds)), config.seeds[:1], []
    for name, main in mains.items():
        others = {arm: of_other_k(main.budget, config.k_factors, arm) for arm in CLASSES}
        for t in every:
            for site in SITES:
                here = replace(main, training_seed=t, site=site)
                swept = others if name in COMPARED and site == "write" else dict.fromkeys(CLASSES, ())
                cells.append(replace(here, beside=swept["crosscoder"]))
                if name in COMPARED:
                    cells.append(replace(here, state="untrained"))
                if name in COMPARED and (t == 0 or site == "write"):
                    seeds = config.seeds if t == 0 else first
                    cells.append(replace(here, arm="layerwise", seeds=seeds, beside=swept["layerwise"]))
            if name == "A":
                cells.append(replace(main, training_seed=t, state="shuffled", seeds=first))
        if name in COMPARED:
            sizes = [with_size(main.budget, size) for size in config.sizes if size != main.budget.n_features]
            cells += [replace(main, role="size", budget=budget, seeds=first) for budget in sizes]
    layers = {name: shape.n_layers for name, shape in config.subjects.shapes().items()}

    def cost(cell: Cell) -> int:
        longer = 1 if cell.arm in SPANNING else 2
        return cell.n_dictionaries * cell.budget.n_features * layers[cell.subject] * longer

    cells = [replace(cell, probed=_is_probed(cell)) for cell in sorted(cells, key=cost, reverse=True)]
    return [*cells, *(_joint_cells(mains["A"], len(every)) if config.joint else ())]


def _is_probed(cell: Cell) -> bool:
    """X is A's, beside its controls; leaving its features out of R needs those of trained B too."""
    known = cell.subject == "A" or (cell.subject, cell.state) == ("B", "trained")
    return known and cell.site == "write" and cell.compared


def _joint_cells(main: Cell, n_runs: int) -> list[Cell]:
    """Crosscoders of A and B of each training seed, of two trainings of A, and of A and B untrained. The last two have
    every dictionary seed, since they have one pair of runs."""
    cells = [replace(main, training_seed=t, other=("B", t), seeds=main.seeds[:1]) for t in range(n_runs)]
    if n_runs > 1:
        cells.append(replace(main, other=("A", 1)))
    return [*cells, replace(main, other=("B", 0), state="untrained")]


@dataclass(frozen=True)
class Part:
    """One of `count` shares of a study's work: whole training runs with everything that is measured on them."""

    index: int = 0
    count: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.count:
            raise ValueError(f"part {self.index} of {self.count}; expected a number from 0 to {self.count - 1}")

    def holds(self, run: Run, runs: Sequence[Run]) -> bool:
        """Whether a training run is this part's."""
        return sorted(runs).index(run) % self.count == self.index


class OtherPartsError(RuntimeError):
    """This part's work is done, and results need what other parts have yet to do."""


def _train_subjects(config: SubjectsConfig, study: StudyFolder, part: Part) -> dict[Run, SubjectRun]:
    runs = config.runs()
    homes = {(name, t): study.root / "subjects" / f"{name}{t}" for name, t in runs}
    jobs: dict[str, Callable[[], Any]] = {
        homes[run].name: partial(_train_one, training, study.root / "tokens", homes[run], study.device)
        for run, training in runs.items()
        if part.holds(run, list(runs)) and not (homes[run] / "run.json").is_file()
    }
    if jobs:
        say(f"training subjects {', '.join(jobs)}")
    study.run(jobs, "subjects")
    left = [home.name for home in homes.values() if not (home / "run.json").is_file()]
    if left:
        raise OtherPartsError(f"this part's subjects are trained; {', '.join(left)} are left for other parts")
    return {run: SubjectRun.load(home) for run, home in homes.items()}


def _train_one(config: SubjectConfig, tokens: Path, folder: Path, device: str) -> None:
    prepared = PreparedTokens.load(tokens)
    made: dict[str, Any] = {"folder": folder, "device": device, "tokenizer": prepared.tokenizer}
    train_subject(config, prepared.train, prepared.held_out, **made, quiet=True)


@dataclass(frozen=True)
class MatchedRuns:
    """One checkpoint of every run, so that all held-out losses agree as well as can be, as late as can be."""

    index: dict[Run, int]
    checkpoints: dict[Run, SubjectCheckpoint]
    gap: float
    """Largest less smallest loss, over their mean."""

    @property
    def matched(self) -> bool:
        """Whether the gap is within the rule's limit."""
        return self.gap <= RULE.loss_gap


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
        choices.append((relative_gap(chosen), float(chosen.mean()), index))
    close = [choice for choice in choices if choice[0] <= RULE.loss_gap / 2]
    gap, _, index = min(close, key=lambda c: c[1]) if close else min(choices, key=lambda c: c[0])
    found = {run: i + 1 for run, i in index.items()}
    return MatchedRuns(found, {run: runs[run][i] for run, i in found.items()}, gap)


def relative_gap(losses: Sequence[float] | np.ndarray) -> float:
    """Largest less smallest, over the mean."""
    return float(np.ptp(losses) / np.mean(losses))


def _harvest(
    config: StudyConfig,
    study: StudyFolder,
    runs: Mapping[Run, SubjectRun],
    chosen: MatchedRuns,
    tokens: PreparedTokens,
) -> StoresOf:
    """Activations of the chosen checkpoints, and of A and B untrained, for training and held out."""
    study.draw_splice_ids(tokens.held_out, config.splice_blocks)
    stores: dict[tuple[str, int, State], Stores] = {}
    jobs: dict[str, Callable[[], Any]] = {}
    for (name, t), run in runs.items():
        for state in STATES if name in COMPARED else STATES[:1]:
            index = chosen.index[name, t] if state == "trained" else 0
            checkpoint = run.folder / run.checkpoints[index].folder
            read = state == "trained" and (t == 0 or name in COMPARED)
            spliced = checkpoint if read and config.splice_blocks else None
            here, home = study.stores(f"{name}{t}", state, spliced=spliced), study.root / "tokens"
            if config.stream:
                most = config.tokens_train, config.tokens_held_out
                stores[name, t, state] = replace(here, streamed=Streamed(checkpoint, home, most))
                continue
            stores[name, t, state] = here
            jobs[f"{name}{t}-{state}"] = partial(_harvest_one, checkpoint, home, here, config, study.device)
    study.run(jobs, "activations")
    return stores


def _harvest_one(checkpoint: Path, tokens: Path, stores: Stores, config: StudyConfig, device: str) -> None:
    harvester = ResidualHarvester(load_checkpoint(checkpoint, device=device))
    most = config.tokens_train, config.tokens_held_out
    harvest_into(stores, harvester, PreparedTokens.load(tokens), most, metadata={"subject": checkpoint.name})


def subject_rows(
    name: str, config: StudyConfig, runs: Mapping[Run, SubjectRun], chosen: MatchedRuns, tokens: PreparedTokens
) -> list[Row]:
    """One shape: its sizes, and the losses of all its training runs; curve and text of the first."""
    run, checkpoint = runs[name, 0], chosen.checkpoints[name, 0]
    compared = evenly(tokens.held_out, LOSS_BLOCKS)
    rows: list[Row] = []
    for t, seed in enumerate(config.subjects.seeds):
        model = runs[name, t].load_model(chosen.index[name, t])
        values = {
            "held_out_loss": held_out_loss(model, compared[:]),
            "untrained_loss": runs[name, t].checkpoints[0].held_out_loss,
            "training_tokens": chosen.checkpoints[name, t].tokens,
            "training_seed_value": seed,
        }
        rows += rows_at(Place(subject=name, training_seed=t), values)
    shape, curve = run.config, run.checkpoints[1:]
    about = {
        "name": name,
        "description": f"Llama-style decoder, {shape.n_layers} layers of width {shape.d_model}, vocabulary "
        f"{tokens.train.vocab_size}, context {shape.context}, learning rate {shape.learning_rate:g}; trained with "
        f"seeds {', '.join(map(str, config.subjects.seeds))}",
        "n_layers": shape.n_layers,
        "d_model": shape.d_model,
        **parameter_counts(run.load_model(chosen.index[name, 0])),
        "epochs": run.epochs * checkpoint.tokens / run.checkpoints[-1].tokens,
        "curve_step": [c.step for c in curve],
        "curve_tokens": [c.tokens for c in curve],
        "curve_loss": [c.held_out_loss for c in curve],
    }
    return [*rows_at(Place(subject=name), about), *rows]
