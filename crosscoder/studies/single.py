"""One real model: its features counted by a per-layer bank and by a crosscoder over the same layers and tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, field, replace
from pathlib import Path
from typing import Any

from pydantic import NonNegativeInt, PositiveInt

from crosscoder.browser.findings import find_features
from crosscoder.browser.folder import write_features
from crosscoder.browser.source import source_of
from crosscoder.data.blocks import input_device
from crosscoder.data.model_loss import causal_loss, describe_policies, loss_of_policies
from crosscoder.data.probe import meaningless_loss
from crosscoder.data.residuals import ResidualHarvester
from crosscoder.data.sources import are_neighbours
from crosscoder.data.subject import USUAL_LOADING, Loading, Subject, load_subject, model_origin
from crosscoder.data.tokenizer import count_ids, find_bos, tokenizer_hash
from crosscoder.data.tokens import PreparedTokens
from crosscoder.dictionary import Dictionary, load_dictionary
from crosscoder.foundation.artifact import MANIFEST
from crosscoder.foundation.config import config as settings
from crosscoder.foundation.console import say
from crosscoder.foundation.origin import MismatchError
from crosscoder.results.file import Results
from crosscoder.results.table import Arm, Place, Row, Site, State, rows_at
from crosscoder.studies.budget import DictionaryBudget, Seeds
from crosscoder.studies.cells import FROZEN, Cell, file_name
from crosscoder.studies.folder import (
    STATES,
    StoresOf,
    StudyFolder,
    harvest_into,
    parameter_counts,
    require_inputs,
    text_hash,
)
from crosscoder.studies.presets import Nulls
from crosscoder.studies.stores import Streamed

NAME = "S"
FOLDER = "features"
LOSS_BLOCKS = 32


@settings
class SubjectStudyConfig:
    """A comparison of the two kinds of dictionary on one model."""

    subject: str
    """A Hugging Face folder, a name on the Hub, a .gguf file, or package:NAME for one inside a Python package."""
    text: str = "sotu"
    context: PositiveInt = 128
    layers: tuple[PositiveInt, ...] | None = None
    """Blocks whose outputs are read, from 1. None: all of them."""
    blocks_path: str | None = None
    loading: Loading = USUAL_LOADING
    dictionaries: DictionaryBudget = field(
        default_factory=lambda: DictionaryBudget(
            n_features=2048, k_crosscoder=64, k_layerwise=32, steps=600, learning_rate=1e-3
        )
    )
    seeds: Seeds = (0, 1)
    tokens_train: PositiveInt = 50_000
    tokens_held_out: PositiveInt = 20_000
    splice_blocks: NonNegativeInt = 8
    nulls: Nulls = ("untrained", "shuffled", "gaussian", "frozen_encoder")
    """What else the crosscoder of the block writes is trained on, or which of its parts is not; the model with new
    initial weights also on the residual stream and by the bank. Those of the writes need neighbouring layers."""
    causal_features: NonNegativeInt = 50
    """Features of the crosscoder on block writes whose layers are ablated one by one in the model; 0: none."""
    keep_activations: bool = False
    stream: bool = False
    """Harvest activations as dictionaries train, again for each, and store none."""
    keep_outliers: bool = False
    """Keep special tokens, first tokens and those of huge norm."""
    browser: bool = True
    """Write what the crosscoder's features mean, as `crosscoder features` does, and link it from the report."""

    def __post_init__(self) -> None:
        if self.layers == ():
            raise ValueError("layers are empty; expected block numbers from 1, or none for all")


def run_subject_study(config: SubjectStudyConfig, *, folder: Path, device: str = "cpu", workers: int = 2) -> Results:
    """The study's results, in the same form as the two-subject study's, with one subject named S."""
    text, subject = text_hash(config.text), load_subject(config.subject, **asdict(config.loading), device=device)
    study = StudyFolder(folder, device=device, workers=workers)  # no folder is left where there is no such model
    with study.alone():
        return _run_stages(config, study, subject, text)


def _run_stages(config: SubjectStudyConfig, study: StudyFolder, subject: Subject, text: str) -> Results:
    origin = model_origin(subject.model, config.subject, config.loading.revision)
    tokenizer = tokenizer_hash(subject.tokenizer)
    require_inputs(study.root, text=text, model=origin.weights, tokenizer=tokenizer)
    study.lap("model")
    tokens = study.tokens(config.text, tokenizer=subject.tokenizer, sequence_length=config.context)
    bos = find_bos(subject.tokenizer)
    losses = loss_of_policies(subject.model, tokens.held_out, bos=bos or subject.tokenizer.bos_token_id)
    say(describe_policies(losses, with_bos=bos is not None))
    study.lap("tokens")
    probed = ResidualHarvester(subject.model, blocks_path=config.blocks_path).probed
    n_blocks, no_loss = probed.n_blocks, meaningless_loss(subject.model, probed)
    for note in dict.fromkeys((*probed.notes, *([] if no_loss is None else [f"no loss is measured: {no_loss}"]))):
        say(f"{Path(config.subject).name}: {note}")
    layers = config.layers or tuple(range(1, n_blocks + 1))
    cells = study_cells(config, layers)

    def harvest() -> StoresOf:
        study.draw_splice_ids(tokens.held_out, config.splice_blocks)
        stores = {}
        for state in STATES if "untrained" in config.nulls else STATES[:1]:
            spliced = config.subject if state == "trained" and config.splice_blocks and no_loss is None else None
            here = study.stores(NAME, state, spliced=spliced, blocks_path=config.blocks_path, loading=config.loading)
            most = config.tokens_train, config.tokens_held_out
            read: dict[str, Any] = {"layers": layers, "blocks_path": config.blocks_path}
            read |= {"keep_outliers": config.keep_outliers}
            streamed = Streamed(
                config.subject,
                study.root / "tokens",
                most,
                untrained=state == "untrained",
                loading=config.loading,
                **read,
            )
            stores[NAME, 0, state] = replace(here, streamed=streamed if config.stream else None)
            if config.stream:
                continue
            say(f"harvesting {sum(most):,} tokens, {state}")
            model = subject.model if state == "trained" else streamed.model(study.device)
            harvester = ResidualHarvester(model, **read, origin=origin if state == "trained" else None)
            harvest_into(here, harvester, tokens, most, quiet=False)
        return stores

    study.run_cells(cells, harvest, keep_activations=config.keep_activations)
    how: dict[str, Any] = {"max_tokens": config.tokens_held_out, "blocks_path": config.blocks_path, "origin": origin}
    shown = browse(study, cells, subject, tokens, **how) if config.browser else []
    study.lap("browser")
    about = describe(config, subject.model, tokens, n_blocks, layers, has_loss=no_loss is None)
    rows = [*rows_at(Place(subject=NAME), about), *study.rows(cells), *shown]
    return study.results(rows, config=config, kind="subject_study", preset="subject", text=config.text, tokens=tokens)


def describe(
    config: SubjectStudyConfig,
    model: Any,
    tokens: PreparedTokens,
    n_blocks: int,
    layers: tuple[int, ...],
    *,
    has_loss: bool,
) -> dict[str, Any]:
    """The model's name, sizes and loss, by the names of quantities."""
    stride = max(1, len(tokens.held_out) // LOSS_BLOCKS)
    sample_BS = tokens.held_out[::stride][:LOSS_BLOCKS]
    d_model = model.config.get_text_config(decoder=True).hidden_size
    return {
        "name": Path(config.subject).name,
        "description": f"{type(model).__name__}, {n_blocks} blocks of width {d_model}; dictionaries on blocks "
        f"{', '.join(map(str, layers))}; loss on {config.text}",
        "n_layers": n_blocks,
        "d_model": d_model,
        **parameter_counts(model),
        "held_out_loss": causal_loss(model, sample_BS.to(input_device(model))) if has_loss else None,
    }


def study_cells(config: SubjectStudyConfig, layers: tuple[int, ...]) -> list[Cell]:
    """The arms on both sites, trained and untrained, and the crosscoder of the block writes on every other null.

    Block writes are differences, so they need neighbouring layers; nulls that join layers need three of them.
    """
    neighbours, budget = are_neighbours(layers), config.dictionaries
    sites: tuple[Site, ...] = ("residual", "write") if neighbours else ("residual",)
    states = STATES if "untrained" in config.nulls else STATES[:1]
    arms: tuple[Arm, ...] = ("layerwise", "crosscoder")
    kinds: list[tuple[Arm, Site, State]] = [(arm, site, state) for arm in arms for site in sites for state in states]
    if neighbours and len(layers) > 2:  # two layers have one write between them
        kinds += [("crosscoder", "write", state) for state in config.nulls if state not in STATES]
    cells = []
    for arm, site, state in kinds:
        joint, joint_write = arm == "crosscoder" and site == sites[-1], arm == "crosscoder" and site == "write"
        learnt = state in STATES or state in FROZEN
        cells.append(
            Cell(
                subject=NAME,
                state=state,
                site=site,
                arm=arm,
                role="main",
                budget=replace(budget, frozen=FROZEN[state]) if state in FROZEN else budget,
                seeds=config.seeds if state in STATES else config.seeds[:1],
                causal=config.causal_features if joint_write and learnt and state != "untrained" else 0,
                labelled=joint and learnt,
            )
        )
    return cells


def browse(
    study: StudyFolder, cells: Sequence[Cell], subject: Subject, tokens: PreparedTokens, **how: Any
) -> list[Row]:
    """Write the features of the first crosscoder of the study's main site, once, and say where they are.

    Nearest features are sought in the bank of the same site and in the crosscoders of other seeds, which also tell
    stability. Reads the held-out text through the model once more, since stores are gone by now. `how` is of
    `source_of`. What goes wrong is the reason of a missing row, not the end of a study.
    """
    trained = [cell for cell in cells if cell.role == "main" and cell.state == "trained"]
    cell = [one for one in trained if one.arm == "crosscoder"][-1]  # block writes, where they are read
    bank = next(one for one in trained if one.arm == "layerwise" and one.site == cell.site)
    at = _of_seed(cell, cell.seeds[0])
    if not (study.root / FOLDER / MANIFEST).is_file():
        others = {f"seed {seed}": _load(study, _of_seed(cell, seed)) for seed in cell.seeds[1:]}
        others["bank"] = _load(study, _of_seed(bank, bank.seeds[0]))
        dictionary = _load(study, at)
        try:
            findings = find_features(
                dictionary,
                source_of(dictionary, subject.model, tokens.held_out, **how),
                tokens.held_out,
                model=subject.model,
                blocks_path=how.get("blocks_path"),
                others=others,
                n_text=count_ids(subject.tokenizer),
            )
            write_features(findings, subject.tokenizer, study.root / FOLDER)
        except MismatchError:
            raise
        except (OSError, ValueError) as error:
            say(f"no browser of the features: {error}")
            return [Row(at, "features_page", None, str(error))]
    return [Row(at, "features_page", f"{FOLDER}/index.html")]


def _of_seed(cell: Cell, seed: int) -> Place:
    return replace(cell.place, seed=seed)


def _load(study: StudyFolder, at: Place) -> Dictionary:
    return load_dictionary(study.root / "dictionaries" / file_name(at)).to(study.device)
