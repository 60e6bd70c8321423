"""One cell of a study: one arm on one source of activations, trained with every seed and k, measured and counted.

Its rows are kept in a file, so that cells can run in any process and order and are skipped when a study is started
again. Both arms of a comparison read the same tokens in the same order: a dictionary seed has its own, alike for both.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor

from crosscoder.browser.source import require_shape
from crosscoder.data.blocks import input_device
from crosscoder.data.nulls import make_null
from crosscoder.data.residuals import find_blocks
from crosscoder.data.sources import Marked, SiteSource, Source
from crosscoder.data.subject import load_model
from crosscoder.data.tokens import PreparedTokens, TokenBlocks
from crosscoder.dictionary import DICTIONARIES, BatchTopK, Dictionary
from crosscoder.dictionary.config import DictionaryConfig
from crosscoder.foundation.failpoints import failpoint
from crosscoder.foundation.origin import MismatchError, Null, require_same
from crosscoder.foundation.signals import safe_points
from crosscoder.foundation.tensors import load_tensors
from crosscoder.measure import causal, counting, dimension, labels, profile, stability, strongest
from crosscoder.measure.reading import Reading, Watch, minimum_probability, read_dictionary, save_reading
from crosscoder.measure.splice import splice_losses
from crosscoder.measure.welch import FEWEST_DOCUMENTS
from crosscoder.results.table import COMPARED, Arm, Place, Role, Row, Site, State, rows_at
from crosscoder.studies.budget import CLASSES, DictionaryBudget, PartialStructure, WholeStructure
from crosscoder.studies.stores import UNFINISHED, Stores
from crosscoder.training import Frozen, TrainConfig, train_many, train_warm_chain

FROZEN: dict[State, Frozen] = {
    "frozen_encoder": "encoder",
    "frozen_decoder": "decoder",
    "soft_decoder": "soft_decoder",
}
"""What is not learnt in a state, as a setting of the budget."""
KEEP_SECONDS = 20.0
"""Work on the dictionaries of a cell above which it is kept until the cell is measured."""
MOST_LABELLED = 256
"""Features whose labels are asked for."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """What is trained: one arm on one site of one subject, or of a null in its place."""

    subject: str
    state: State
    site: Site
    arm: Arm
    role: Role
    budget: DictionaryBudget
    seeds: tuple[int, ...] = (0, 1)
    """Of dictionaries; each also has its own order of the text."""
    training_seed: int = 0
    """Position of the subject's training seed in the study's list."""
    causal: int = 0
    """Features of the first dictionary whose layers are ablated in the subject; 0: none."""
    labelled: bool = False
    """Ask how well features tell labels of the text, on all layers together and on the best one."""
    beside: tuple[DictionaryBudget, ...] = ()
    """Of other k: a dictionary of the first seed for each, trained on the same batches side by side."""

    def __post_init__(self) -> None:
        if self.budget.structure in get_args(PartialStructure):
            raise ValueError(
                f"a crosscoder that is {self.budget.structure} leaves layers out, and a study compares all layers; use "
                f"one of {get_args(WholeStructure)}, or train it by itself"
            )

    @property
    def sweep(self) -> list[Cell]:
        """What is measured together, as cells of one k each: the cell's own, and those beside it."""
        main = replace(self, beside=())
        one = replace(main, role="k", seeds=self.seeds[:1], causal=0, labelled=False)
        return [main, *(replace(one, budget=budget) for budget in self.beside)]

    @property
    def n_dictionaries(self) -> int:
        return len(self.seeds) + len(self.beside)

    @property
    def place(self) -> Place:
        """Where its numbers are measured; those beside it have places of their own (`sweep`)."""
        return Place(
            subject=self.subject,
            training_seed=self.training_seed,
            state=self.state,
            site=self.site,
            arm=self.arm,
            role=self.role,
            n_features=self.budget.n(self.arm),
            k=self.budget.k(self.arm),
        )

    @property
    def read(self) -> tuple[str, int, State]:
        """The activations that it reads: shape, position of the training seed, and the subject's own state."""
        return self.subject, self.training_seed, "untrained" if self.state == "untrained" else "trained"

    @property
    def name(self) -> str:
        """A file name that tells the cells of one study apart."""
        return file_name(self.place)

    def measure(self, store: Stores, folder: Path, *, device: str = "cpu") -> list[Row]:
        """Train, measure and count every dictionary; readings of all, and main dictionaries of trained subjects, are
        kept in the study's folder."""
        stored = store.source(self.site, device)
        source = null_source(self.state, stored)
        plans = [
            (replace(part.budget, data_seed=part.budget.data_seed + seed), seed)
            for part in self.sweep
            for seed in part.seeds
        ]
        where: dict[str, Any] = {"device": device, "folder": folder / UNFINISHED / self.name}
        trained = iter(fit_many(self.arm, source, plans, label=self.name, **where))
        failpoint("cell.trained")
        measured = MeasuredCell(store, stored, source, folder, device)
        return [row for part in self.sweep for row in measured.rows(part, [next(trained) for _ in part.seeds])]


def null_source(state: State, stored: SiteSource) -> Source:
    """What is read in a state: the activations themselves, or what stands in their place."""
    return make_null(state if state in get_args(Null) else None, stored)  # ty: ignore[invalid-argument-type]


def file_name(at: Place) -> str:
    """A name for what is kept of the dictionary, or of all seeds of it, at a place."""
    name = f"{at.subject}{at.training_seed}-{at.state}-{at.site}-{at.arm}-n{at.n_features}-k{at.k}"
    return name if at.seed is None else f"{name}-seed{at.seed}"


def reading_path(folder: Path, at: Place) -> Path:
    """The file in a study's folder of the reading of the dictionary at a place, whose seed is given."""
    return folder / "readings" / f"{file_name(at)}.safetensors"


@dataclass(frozen=True)
class MeasuredCell:
    """Everything that is asked of trained dictionaries of one cell, on the activations that they were trained on."""

    store: Stores
    stored: SiteSource
    source: Source
    folder: Path
    device: str

    def rows(self, cell: Cell, dictionaries: Sequence[Dictionary]) -> list[Row]:
        """Rows of all seeds of one k."""
        rows, readings = list[Row](), list[Reading]()
        for seed, dictionary in zip(cell.seeds, dictionaries, strict=True):
            at, first = replace(cell.place, seed=seed), seed == cell.seeds[0]
            reading = read_dictionary(dictionary, marked(self.source, self.device), self.text(cell))
            rows += dictionary_rows(at, dictionary, reading, self.text(cell))
            if cell.state not in get_args(Null) and self.store.subject is not None:
                rows += self._in_subject(cell, at, dictionary, first=first)
            if cell.labelled and first:
                rows += self._labels(at, dictionary, reading)
            if cell.role == "main" and cell.state == "trained":
                dictionary.save_pretrained(self.folder / "dictionaries" / file_name(at))
            path = reading_path(self.folder, at)
            path.parent.mkdir(parents=True, exist_ok=True)
            save_reading(reading, path)
            readings.append(reading)
        return _cell_rows(cell, self.stored.sites, readings) + rows

    def text(self, cell: Cell) -> TokenBlocks | None:
        """The held-out text, where there is to be an interval and documents enough to know what of it is theirs; tokens
        of a null that stands in for activations are of no document."""
        if self.store.tokens is None or cell.state in get_args(Null) or cell.subject not in COMPARED:
            return None
        blocks = self._tokens.held_out
        return blocks if blocks.n_documents >= FEWEST_DOCUMENTS else None

    @cached_property
    def _tokens(self) -> PreparedTokens:
        assert self.store.tokens is not None
        return PreparedTokens.load(self.store.tokens)

    def _in_subject(self, cell: Cell, at: Place, dictionary: Dictionary, *, first: bool) -> list[Row]:
        """What the subject predicts with reconstructions in place, and without single features."""
        assert self.store.subject is not None
        assert self.store.held_out_ids is not None
        model = load_model(self.store.subject, **asdict(self.store.loading), device=self.device)
        drawn = load_tensors(self.store.held_out_ids)
        ids_RS = drawn["ids"].long().to(input_device(model))
        blocks = list(find_blocks(model, self.store.blocks_path))
        where: dict[str, Any] = {"layers": self.stored.sites, "kind": at.site}
        n_documents, rows = 0, list[Row]()
        if (text := self.text(cell)) is not None:
            document_R, n_documents = text.document_groups[drawn["blocks"].numpy()], text.n_groups
            where["document_R"] = document_R if len(np.unique(document_R)) >= FEWEST_DOCUMENTS else None
        if cell.state != "untrained":  # an untrained model predicts nothing that could be lost
            each = cell.role == "main" and cell.training_seed == 0 and first
            found = splice_losses(
                dictionary, model, blocks, ids_RS.split(16), **where, each=each, n_documents=n_documents
            )
            rows += rows_at(at, found.clean)
            rows += [row for layer, values in found.sites.items() for row in rows_at(replace(at, layer=layer), values)]
        if cell.causal and first and self.source.n_layers > 1:
            try:
                effects = causal.measure_causal_layers(
                    dictionary, model, blocks, ids_RS, **where, n_features=cell.causal, quiet=True
                )
            except MismatchError:
                raise
            except ValueError as error:  # such as weights too coarse for small effects: not the end of a study
                return [*rows, Row(at, "causal_layers", None, str(error))]
            rows += rows_at(at, effects.summary() | strongest.describe_effects(effects))
        return rows

    def _labels(self, at: Place, dictionary: Dictionary, reading: Reading) -> list[Row]:
        """How well alive features, some of them where there are many, tell labels of the held-out text."""
        assert reading.token_T is not None
        tokens = self._tokens
        text = labels.label_text(tokens.held_out[:].numpy(), tokens.tokenizer, reading.token_T)
        chosen = np.random.default_rng(0).permutation(reading.index_F)[:MOST_LABELLED]
        document_T = tokens.held_out.documents[reading.token_T // tokens.held_out.sequence_length]
        read = partial(held_out, self.source, self.device)
        found = labels.measure_labels(dictionary, read, text, np.sort(chosen), document_T=document_T, quiet=True)
        first = strongest.describe_strongest(reading, dictionary.input_scale.cpu().numpy(), tokens)
        return rows_at(at, found.summary() | first)


def new_dictionary(arm: Arm, source: Source, budget: DictionaryBudget, *, seed: int, share: Any = None) -> Any:
    """An untrained dictionary of one arm for the activations of `source`, with their scales.

    share: what says of a class and config which part to hold (`shard_for`); None: all.
    """
    form = DICTIONARIES[CLASSES[arm]]
    settings: dict[str, Any] = {"d_model": source.d_model, "seed": seed, **budget.settings(arm)}
    config = DictionaryConfig(n_layers=source.n_layers, **settings)
    dictionary = form(shard=share and share(form, config), **config.settings())
    dictionary.set_input(source.scale_L, source.reads)
    return dictionary


def fit_many(
    arm: Arm,
    source: Source,
    plans: Sequence[tuple[DictionaryBudget, int]],
    *,
    training: TrainConfig | None = None,
    label: str = "",
    device: str = "cpu",
    folder: Path | None = None,
) -> list[Dictionary]:
    """A dictionary of each budget and seed, in their order; those of one data order train on its batches side by side.

    The same numbers as one by one. Budgets may differ in size, k and data order alone: the first says how all are
    trained. What took long goes on in `folder` after a stop, and is to be removed once nothing more comes of it.
    training: the trainer's settings where they are not the budget's.
    """
    dictionaries = [new_dictionary(arm, source, budget, seed=seed) for budget, seed in plans]
    first = plans[0][0]
    given: dict[str, Any] = {"config": training or first.train_config(), "device": device, "quiet": True}
    given |= {"resume": True, "scratch_seconds": KEEP_SECONDS, "data_fingerprint": source.fingerprint or None}
    for order in dict.fromkeys(budget.data_seed for budget, _ in plans):
        group = [one for one, (budget, _) in zip(dictionaries, plans, strict=True) if budget.data_seed == order]
        batches = source.batches(first.batch, seed=order, steps=first.steps)
        home = None if folder is None else folder / f"order-{order}"
        if first.trainer(arm) is train_warm_chain:
            for number, dictionary in enumerate(group):
                own = None if home is None else home / f"{number}"
                train_warm_chain(dictionary, batches, label=label, folder=own, **given)
        else:
            train_many(group, batches, label=label, folder=home, **given)
    return dictionaries


def held_out(source: Source, device: str) -> Iterator[Tensor]:
    """The held-out batches of a source on a device."""
    return (x_BLD.to(device) for x_BLD in safe_points(source.held_out()))


def marked(source: Source, device: str) -> Iterator[Marked]:
    """All held-out tokens of a source on a device, outliers marked."""
    return safe_points(source.marked_on(device))


def dictionary_rows(at: Place, dictionary: Dictionary, reading: Reading, text: TokenBlocks | None = None) -> list[Row]:
    """What one trained dictionary counts, explains and, where features extend over layers, how they do.

    text: that it was read on, where loads without each document of it are asked for.
    """
    values = counting.count_features(reading, alike=at.role != "k") | {
        "explained_variance": reading.explained_variance,
        "explained_variance_per_layer": reading.explained_variance_L.tolist(),
        "l0_token": reading.l0,
        "l0_token_layer": reading.l0_layer,
        "threshold": dictionary.threshold.tolist() if isinstance(dictionary.config.sparsity, BatchTopK) else None,
    }
    if text is not None:
        assert reading.explained_left_E is not None
        left = {"entropy_load": counting.load_left(reading, text), "explained_variance": reading.explained_left_E}
        values |= {f"{key}_left": left_E.tolist() for key, left_E in left.items()}
    if (found := reading.outliers) is not None:
        values |= {
            "explained_variance_usual": found.explained_variance_usual,
            "explained_variance_every": found.explained_variance_every,
            "outlier_share": found.share,
            "outlier_share_per_layer": found.share_L.tolist(),
            "outlier_energy_per_layer": found.energy_L.tolist(),
        }
    if reading.n_groups == 1:
        values |= profile.describe_profiles(reading.decoder_FLD)
        values |= _direction_values(dictionary, reading, text if at.role == "main" else None)
    return rows_at(at, values)


def _direction_values(dictionary: Dictionary, reading: Reading, text: TokenBlocks | None) -> dict[str, Any]:
    """Layers that features occupy in the subject's own units, twins, and the density with and without these."""
    own_FLD = reading.decoder_FLD / dictionary.input_scale.cpu().numpy()[:, None]
    is_twin_F = profile.find_twins(reading.decoder_FLD)
    parts = {"raw_density": reading, "raw_density_rest": reading.only(~is_twin_F)}
    rooms = {key: dimension.effective_dimension(part.decoder_FLD) for key, part in parts.items()}
    loads = {key: float(counting.binary_entropy(part.probability_F).sum()) for key, part in parts.items()}
    left = {} if text is None else {key: counting.load_left(part, text) for key, part in parts.items()}
    return {
        "mean_rho_model": profile.known_mean(profile.participation_ratio(profile.layer_profile(own_FLD))),
        "twin_share": float(is_twin_F.mean()) if len(reading) else None,
        **{key: loads[key] / rooms[key] if rooms[key] > 0 else None for key in parts},
        **{f"{key}_left": (left_E / rooms[key]).tolist() for key, left_E in left.items() if rooms[key] > 0},
    }


def _cell_rows(cell: Cell, sites: tuple[int, ...], readings: list[Reading]) -> list[Row]:
    """What all seeds of a cell share, and how they agree."""
    values = {
        "tokens_train": cell.budget.steps * cell.budget.batch,
        "tokens_held_out": readings[0].n_tokens,
        "p_min": minimum_probability(readings[0].n_tokens),
        **counting.compare_seeds(readings),
    }
    if readings[0].n_groups == 1:
        if len(readings) > 2 and all(len(reading) for reading in readings):
            values |= stability.measure_stability(readings).summary()
        values |= {"profile_heatmap": profile.heatmap(readings[0].profile_FL), "layers": [str(site) for site in sites]}
    return rows_at(cell.place, values)


def evaluate_dictionary(
    dictionary: Dictionary, source: Source, *, device: str = "cpu", watch: Watch = None, owner: str = "the dictionary"
) -> Reading:
    """The reading of a trained dictionary on the held-out tokens of a source.

    The source is to be at the dictionary's own scale (`SiteSource(..., scale_L=dictionary.input_scale)`); raises as
    `require_source`. `watch` is given every batch with its code; `owner` is how a refusal calls the dictionary.
    """
    require_source(dictionary, source, owner=owner)
    return read_dictionary(dictionary, marked(source, device), watch=watch)


def require_source(dictionary: Dictionary, source: Source, *, owner: str = "the dictionary") -> None:
    """Refuse a source that a trained dictionary does not belong to."""
    require_same(dictionary.reads, source.reads, owner=owner, given="the activations")
    require_shape(dictionary, source, owner=owner)
    if not torch.allclose(source.scale_L, dictionary.input_scale.cpu(), rtol=1e-5):
        raise MismatchError("the activations are at another scale than the dictionary's inputs; give its input_scale")
