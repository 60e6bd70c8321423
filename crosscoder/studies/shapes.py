"""The main job: transformers of equal parameters and unequal shape, what their features load and how they share room.

Subject A has L layers of width d, subject B L/4 layers of width 2d; shapes of a grid lie around them. Each is trained
with several seeds on the same text, and checkpoints of A and B with the same held-out loss are taken. On what their
blocks write dictionaries of several k are trained, joint and layer by layer, and on nulls in their place; the rule then
says what the numbers mean. Every stage keeps its result in the study's folder, so a study that was stopped goes on
where it was.
"""

from __future__ import annotations

import math
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
    block_losses,
    load_checkpoint,
    train_subject,
)
from crosscoder.data.tokens import PreparedTokens
from crosscoder.foundation.config import require_count
from crosscoder.foundation.console import say
from crosscoder.results.file import Results
from crosscoder.results.table import COMPARED, Arm, LongTable, Place, Row, State, rows_at
from crosscoder.studies import judge
from crosscoder.studies.baselines import LOSS_BLOCKS, baseline_rows, evenly, loss_values
from crosscoder.studies.budget import SPANNING, DictionaryBudget, of_other_k, of_size
from crosscoder.studies.calibration import calibrate_study
from crosscoder.studies.cells import FROZEN, Cell
from crosscoder.studies.folder import (
    STATES,
    Measured,
    StoresOf,
    StudyFolder,
    harvest_into,
    parameter_counts,
    require_inputs,
    text_hash,
)
from crosscoder.studies.presets import Run, StudyConfig, SubjectsConfig
from crosscoder.studies.rooms import Room
from crosscoder.studies.stores import Stores, Streamed

DECAYED = 0.2
"""Share of its peak that the learning rate is to have fallen to at the checkpoints that are compared."""
MATCHED = 0.005
"""|ln| of B's mean loss over A's from which a choice of checkpoints is as good as another."""
ALIKE = 0.01
"""Range of ln loss over all runs from which it is: of such choices the one of least loss is taken."""


def run_study(
    config: StudyConfig, *, folder: Path, preset: str, device: str = "cpu", workers: int = 2, part: Part | None = None
) -> Results:
    """The study's results; every stage is kept under `folder` and not run twice.

    Raises:
        OtherPartsError: `part` is not the whole study, and other parts are not done yet.
    """
    part, text = part or Part(), text_hash(config.subjects.text)
    study = StudyFolder(folder, device=device, workers=workers)
    with study.alone(part.name):
        require_inputs(folder, text=text)
        return _run_stages(config, study, part, preset)


def _run_stages(config: StudyConfig, study: StudyFolder, part: Part, preset: str) -> Results:
    subjects = config.subjects
    of_text = {"vocab_size": subjects.vocab_size, "sequence_length": subjects.context, "seed": subjects.seed}
    tokens = study.tokens(subjects.text, held_out_fraction=subjects.held_out_fraction, **of_text)
    study.lap("tokens")
    runs = _train_subjects(subjects, study, part)
    chosen = choose_checkpoints(runs)
    said = [f"{name}{t} {c.held_out_loss:.4f} after {c.tokens:,}" for (name, t), c in chosen.checkpoints.items()]
    say(f"checkpoints, nats/token after tokens: {', '.join(said)}; ln(B / A) {chosen.log_ratio:+.4f}")
    study.lap("subjects")
    cells = study_cells(config)
    own = [cell for cell in cells if part.holds(cell.read[:2], list(runs))]
    read = {cell.read[:2] for cell in own}
    harvest = partial(_harvest, config, study, {run: runs[run] for run in runs if run in read}, chosen, tokens)
    study.run_cells(own, harvest, keep_activations=config.keep_activations)
    if left := study.left(cells):
        raise OtherPartsError(f"this part is done; {len(left)} of {len(cells)} cells are left for other parts")
    rows = [row for name in subjects.shapes() for row in subject_rows(name, config, runs, chosen, tokens)]
    compared = {run: found for run, found in runs.items() if run[0] in COMPARED}
    rows += baseline_rows(study, compared, chosen.index)
    study.lap("baselines")
    further = {"vocabulary": tokens.train.vocab_size, "text_tokens": tokens.train.n_tokens}
    further["n_documents"] = tokens.held_out.n_documents
    rows += [*rows_at(Place(), further), *study.rows(cells), *calibrate_study(config, study)]
    study.lap("calibration")
    measured, verdict = judge.judge(config, LongTable(tuple(rows)), study.root, documents=tokens.held_out.documents)
    study.lap("verdict")
    rows += measured
    return study.results(
        rows, verdict, config=config, tokens=tokens, kind="aspect_ratio", preset=preset, text=subjects.text
    )


def study_cells(config: StudyConfig) -> list[Measured]:
    """Everything that is measured on activations, what takes longest first."""
    return [*dictionary_cells(config), *room_cells(config)]


def dictionary_cells(config: StudyConfig) -> list[Cell]:
    """All cells of A and B, and of the grid where it has banks, what takes longest first."""
    shapes = config.subjects.shapes()
    runs = [run for run in config.subjects.runs() if run[0] in COMPARED or config.grid_banks]
    cells = [cell for name, t in runs for cell in _cells(config, name, t)]
    cells.sort(key=lambda cell: _cost(cell, shapes[cell.subject].n_layers), reverse=True)
    return cells


def room_cells(config: StudyConfig) -> list[Room]:
    """The rooms of all trainings, and of A and B untrained where that is a null."""
    rooms = [Room(subject=name, training_seed=t) for name, t in config.subjects.runs()]
    return rooms + [
        replace(room, state="untrained")
        for room in rooms
        if room.subject in COMPARED and "untrained" in config.nulls and room.training_seed < config.null_trainings
    ]


def _cells(config: StudyConfig, name: str, t: int) -> list[Cell]:
    """The dictionaries of one training of A or B: crosscoder and bank of several k; nulls, sizes and the residual
    stream where this training has them. Of the grid's shapes the bank alone."""
    shape = config.subjects.shapes()[name]
    budget, first = shape.budget(config.dictionaries), config.seeds[:1]
    where: dict[str, Any] = {"subject": name, "training_seed": t, "site": "write", "role": "main", "budget": budget}

    def cell(arm: Arm, state: State = "trained", **how: Any) -> Cell:
        here = budget if state not in FROZEN else replace(budget, frozen=FROZEN[state])
        if state in config.null_single_k:
            ks: tuple[DictionaryBudget, ...] = ()
        elif state == "trained":
            ks = shape.sweep(here, arm, config.k_factors)
        else:
            factors = config.null_factors if arm == "crosscoder" else config.null_bank_factors
            ks = of_other_k(here, arm, [budget.k(arm) * factor for factor in factors])
        given: dict[str, Any] = where | {"arm": arm, "state": state, "budget": here, "beside": ks} | how
        return Cell(**given)

    if name not in COMPARED:
        return [cell("layerwise", seeds=first)]
    seeds, causal = config.stability_seeds if t == 0 else config.seeds, config.causal_features
    cells = [cell("crosscoder", seeds=seeds, causal=causal, labelled=t == 0), cell("layerwise", seeds=first)]
    if t < config.residual_trainings:
        cells.append(cell("crosscoder", seeds=first, site="residual", beside=()))
    if t < config.null_trainings:
        for state in config.nulls:
            acts = causal if state in FROZEN or state == "untrained" else 0
            cells.append(cell("crosscoder", state, seeds=first, causal=acts, labelled=t == 0 and state in FROZEN))
        banks = [state for state in config.null_banks if state in config.nulls]
        cells += [cell("layerwise", state, seeds=first) for state in banks]
        for factor in config.size_factors:
            larger = of_size(budget, round(factor * budget.n_features))
            cells.append(cell("crosscoder", seeds=first, role="size", budget=larger, beside=()))
    return cells


def _cost(cell: Cell, n_layers: int) -> float:
    """About how long it takes, for the order alone."""
    return cell.n_dictionaries * cell.budget.n(cell.arm) * n_layers * (1 if cell.arm in SPANNING else 2)


@dataclass(frozen=True)
class Part:
    """One of `count` shares of a study's work: whole training runs with everything that is measured on them."""

    index: int = 0
    count: int = 1

    def __post_init__(self) -> None:
        require_count(**{"the number of parts": self.count})
        if type(self.index) is not int or not 0 <= self.index < self.count:
            raise ValueError(f"part {self.index} of {self.count}; expected a number from 0 to {self.count - 1}")

    @property
    def name(self) -> str:
        """Empty for the whole."""
        return f"{self.index}-of-{self.count}" if self.count > 1 else ""

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
class ChosenRuns:
    """The checkpoint of every run that is read."""

    index: dict[Run, int]
    checkpoints: dict[Run, SubjectCheckpoint]
    log_ratio: float
    """ln of B's mean loss over A's."""


def choose_checkpoints(runs: Mapping[Run, SubjectRun]) -> ChosenRuns:
    """Checkpoints of A and B with equal losses and a learning rate that has decayed; the last of every other shape.

    For every loss that some such checkpoint has, each run offers the one nearest to it. Of the offers whose mean losses
    differ by no more than `MATCHED` (or, without any, as little as can be) the one with the least spread over all runs,
    and of those with no more than `ALIKE` the one with the least loss.
    """
    allowed = {run: decayed_checkpoints(found) for run, found in runs.items() if run[0] in COMPARED}
    losses = {run: np.array([runs[run].checkpoints[i].held_out_loss for i in at]) for run, at in allowed.items()}
    offers = []
    for target in sorted(set(np.concatenate(list(losses.values())).tolist())):
        index = {run: int(np.abs(values - target).argmin()) for run, values in losses.items()}
        logs = {name: [math.log(losses[run][i]) for run, i in index.items() if run[0] == name] for name in COMPARED}
        ratio = float(np.mean(logs["B"]) - np.mean(logs["A"]))
        spread = float(np.ptp([*logs["A"], *logs["B"]]))
        offers.append((max(abs(ratio) - MATCHED, 0.0), max(spread - ALIKE, 0.0), target, ratio, index))
    *_, ratio, nearest = min(offers, key=lambda offer: offer[:3])
    last = {run: len(found.checkpoints) - 1 for run, found in runs.items()}
    index = last | {run: allowed[run][i] for run, i in nearest.items()}
    return ChosenRuns(index, {run: runs[run].checkpoints[i] for run, i in index.items()}, ratio)


def rate_share(run: SubjectRun, index: int) -> float:
    """The learning rate of the last step before a checkpoint, over its peak."""
    config = run.config
    return config.learning_rate_at(max(0, run.checkpoints[index].step - 1)) / config.learning_rate


def decayed_checkpoints(run: SubjectRun) -> list[int]:
    """Positions of the checkpoints whose learning rate has decayed; of the last where none has."""
    last = len(run.checkpoints) - 1
    return [i for i in range(1, last + 1) if rate_share(run, i) <= DECAYED] or [last]


def _harvest(
    config: StudyConfig,
    study: StudyFolder,
    runs: Mapping[Run, SubjectRun],
    chosen: ChosenRuns,
    tokens: PreparedTokens,
) -> StoresOf:
    """Activations of the chosen checkpoints, and of untrained ones where these are a null."""
    study.draw_splice_ids(tokens.held_out, config.splice_blocks)
    stores: dict[tuple[str, int, State], Stores] = {}
    jobs: dict[str, Callable[[], Any]] = {}
    for (name, t), run in runs.items():
        has_null = name in COMPARED and t < config.null_trainings and "untrained" in config.nulls
        for state in STATES if has_null else STATES[:1]:
            index = chosen.index[name, t] if state == "trained" else 0
            checkpoint = run.folder / run.checkpoints[index].folder
            read = name in COMPARED or config.grid_banks
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
    name: str, config: StudyConfig, runs: Mapping[Run, SubjectRun], chosen: ChosenRuns, tokens: PreparedTokens
) -> list[Row]:
    """One shape: its sizes, and the losses of all its training runs; curve and text of the first."""
    own = {t: run for (shape, t), run in runs.items() if shape == name}
    run, checkpoint = own[0], chosen.checkpoints[name, 0]
    compared, rows = evenly(tokens.held_out, LOSS_BLOCKS), list[Row]()
    for t, one in own.items():
        index = chosen.index[name, t]
        values = {
            **loss_values("held_out_loss", block_losses(one.load_model(index), compared[:]).cpu().numpy(), compared),
            "untrained_loss": one.checkpoints[0].held_out_loss,
            "training_tokens": one.checkpoints[index].tokens,
            "training_seed_value": one.config.seed,
            "rate_share": rate_share(one, index),
        }
        rows += rows_at(Place(subject=name, training_seed=t), values)
    shape, curve = run.config, run.checkpoints[1:]
    seeds = ", ".join(str(one.config.seed) for one in own.values())
    about = {
        "name": name,
        "description": f"Llama-style decoder, {shape.n_layers} layers of width {shape.d_model}, vocabulary "
        f"{tokens.train.vocab_size}, context {shape.context}, learning rate {shape.learning_rate:g}; trained with "
        f"seeds {seeds}",
        "n_layers": shape.n_layers,
        "d_model": shape.d_model,
        "depth_over_width": shape.n_layers / shape.d_model**0.44,
        **parameter_counts(run.load_model(chosen.index[name, 0])),
        "epochs": run.epochs * checkpoint.tokens / run.checkpoints[-1].tokens,
        "curve_step": [c.step for c in curve],
        "curve_tokens": [c.tokens for c in curve],
        "curve_loss": [c.held_out_loss for c in curve],
    }
    return [*rows_at(Place(subject=name), about), *rows]
