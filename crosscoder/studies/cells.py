"""One cell of a study: one arm on one source of activations, trained with every seed, measured and counted.

Its rows are kept in a file, so that cells can run in any process and order and are skipped when a study is started
again. Both arms of a comparison read the same tokens in the same order: it depends on the data seed, never on the
dictionary's.

A joint cell is a crosscoder over two subjects at once, stacked and told apart by `Diffing`, so that a shared feature is
one latent and the others are one subject's alone. Activity correlation (`measure.universality`) compares dictionaries
that never saw each other's subject.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor, nn

from crosscoder.data.blocks import input_device
from crosscoder.data.residuals import find_blocks
from crosscoder.data.shards import stored_source
from crosscoder.data.sources import Marked, ShuffledSource, SiteSource, Source, StackedSource
from crosscoder.data.stream import stream_source
from crosscoder.data.subject import USUAL_LOADING, Loading, load_model, load_untrained
from crosscoder.dictionary import DICTIONARIES, BatchTopK, Dictionary, Diffing
from crosscoder.foundation.origin import MismatchError, require_same
from crosscoder.measure import counting, probes, profile, universality
from crosscoder.measure.reading import Reading, minimum_probability, read_dictionary, save_reading
from crosscoder.measure.splice import splice_losses
from crosscoder.results.table import Place, Role, Row, Site, State, finite, rows_at
from crosscoder.studies.budget import CLASSES, SPANNING, Arm, DictionaryBudget, PartialStructure, WholeStructure
from crosscoder.studies.presets import Run
from crosscoder.training import TrainConfig, train_many, train_warm_chain

SHUFFLE_SEED = 1
MOST_PROBED = 2048  # features; of larger dictionaries so many are drawn at random


@dataclass(frozen=True)
class Streamed:
    """A model whose activations are harvested as cells train, and not stored."""

    subject: Path | str
    tokens: Path
    """Folder of token blocks."""
    most: tuple[int, int]
    """Tokens to read for training and held out."""
    untrained: bool = False
    layers: tuple[int, ...] | None = None
    blocks_path: str | None = None
    keep_outliers: bool = False
    loading: Loading = USUAL_LOADING

    def source(self, site: Site, device: str) -> SiteSource:
        """The activations of one site."""
        return stream_source(
            self.model(device),
            self.tokens,
            kind=site,
            layers=self.layers,
            blocks_path=self.blocks_path,
            keep_outliers=self.keep_outliers,
            max_tokens=self.most[0],
            max_held_out_tokens=self.most[1],
        )

    def model(self, device: str) -> nn.Module:
        """The model, trained or with weights drawn anew."""
        if not self.untrained:
            return load_model(self.subject, **asdict(self.loading), device=device)
        revision, dtype = self.loading.revision, self.loading.dtype
        return load_untrained(self.subject, revision=revision, dtype=dtype, device=device)


@dataclass(frozen=True)
class Stores:
    """Where a subject's activations lie, and what a spliced evaluation needs of it."""

    train: Path
    held_out: Path
    streamed: Streamed | None = None
    """Where nothing is stored."""
    subject: Path | str | None = None
    """Folder or name of the subject, for splicing; None leaves splicing out."""
    held_out_ids: Path | None = None
    """Token blocks `[n, S]` to splice on, as safetensors."""
    blocks_path: str | None = None
    loading: Loading = USUAL_LOADING

    def source(self, site: Site, device: str) -> SiteSource:
        """The activations of one site; hashes are not checked again."""
        if self.streamed is not None:
            return self.streamed.source(site, device)
        return stored_source(self.train, self.held_out, site, verify=False)


@dataclass(frozen=True, kw_only=True)
class Cell:
    """What is trained: one arm on one site of one subject, or of two stacked, in one state."""

    subject: str
    state: State
    """`shuffled`: trained, each layer's tokens in an order of its own."""
    site: Site
    arm: Arm
    role: Role
    budget: DictionaryBudget
    seeds: tuple[int, ...] = (0, 1)
    training_seed: int = 0
    """Position of the subject's training seed in the study's list."""
    other: Run | None = None
    """The second subject of a joint crosscoder."""
    probed: bool = False
    """Measure from which layers features are read, and whether a single layer tells when they are active."""
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
        """What is trained together, as cells of one k each: the cell's own, and those beside it."""
        main = replace(self, beside=())
        one = replace(main, role="k", seeds=self.seeds[:1], probed=False)
        return [main, *(replace(one, budget=budget) for budget in self.beside)]

    @property
    def n_dictionaries(self) -> int:
        """How many are trained."""
        return len(self.seeds) + len(self.beside)

    @property
    def place(self) -> Place:
        """Where its numbers are measured; those beside it have places of their own (`sweep`)."""
        return Place(
            subject=self.subject,
            training_seed=self.training_seed,
            other=None if self.other is None else "{}{}".format(*self.other),
            state=self.state,
            site=self.site,
            arm=self.arm if self.other is None else "joint",
            role=self.role,
            n_features=self.budget.n_features,
            k=self.budget.k(self.arm),
        )

    @property
    def runs(self) -> tuple[Run, ...]:
        """The training runs that it reads."""
        return ((self.subject, self.training_seed), *(() if self.other is None else (self.other,)))

    @property
    def name(self) -> str:
        """A file name that tells the cells of one study apart."""
        return file_name(self.place)

    @property
    def compared(self) -> bool:
        """Whether its dictionaries are read by the verdict: the main crosscoders of one subject."""
        return self.role == "main" and self.other is None and self.arm in SPANNING


def file_name(at: Place) -> str:
    """A name for what is kept of the dictionary, or of all seeds of it, at a place."""
    runs = f"{at.subject}{at.training_seed}" + (f"+{at.other}" if at.other else "")
    name = f"{runs}-{at.state}-{at.site}-{at.arm}-n{at.n_features}-k{at.k}"
    return name if at.seed is None else f"{name}-seed{at.seed}"


def reading_path(folder: Path, at: Place) -> Path:
    """The file in a study's folder of the reading of the dictionary at a place, whose seed is given."""
    return folder / "readings" / f"{file_name(at)}.safetensors"


def run_cell(cell: Cell, stores: Sequence[Stores], folder: Path, *, device: str = "cpu") -> list[Row]:
    """Train, measure and count every seed of `cell`, on the activations of each of its runs.

    The readings that the verdict needs, and the main dictionaries of trained subjects, are kept in the study's folder.

    Raises:
        ValueError: the stores of a joint cell do not hold the same tokens.
    """
    if cell.other is not None:
        stacked = StackedSource([store.source(cell.site, device) for store in stores])
        return [row for seed in cell.seeds for row in joint_rows(cell, stacked, seed, device=device)]
    (store,) = stores
    stored = store.source(cell.site, device)
    source = ShuffledSource(stored, SHUFFLE_SEED) if cell.state == "shuffled" else stored
    parts = cell.sweep
    plans = [(part.budget, seed) for part in parts for seed in part.seeds]
    trained = iter(fit_many(cell.arm, source, plans, label=file_name(cell.place), device=device))
    return [row for part in parts for row in _part_rows(part, store, stored, source, trained, folder, device)]


def _part_rows(
    cell: Cell, store: Stores, stored: SiteSource, source: Source, dictionaries: Iterator[Dictionary], folder: Path,
    device: str,
) -> list[Row]:  # fmt: skip
    """Measure and count every seed of a cell of one k, whose dictionaries come next."""
    rows, readings = list[Row](), list[Reading]()
    for seed in cell.seeds:
        dictionary, at = next(dictionaries), replace(cell.place, seed=seed)
        reading = read_dictionary(dictionary, marked(source, device))
        rows += dictionary_rows(at, dictionary, reading)
        if cell.state != "shuffled" and store.subject is not None:
            each = cell.role == "main" and cell.training_seed == 0 and seed == cell.seeds[0]
            rows += _splice(at, dictionary, stored.sites, store, device, each=each)
        if cell.role == "main" and cell.state == "trained":
            dictionary.save_pretrained(folder / "dictionaries" / file_name(at))
        if cell.compared:
            kept = reading.distinct
            if cell.probed and len(kept) and source.n_layers > 1:
                found = probe(dictionary, lambda: (x_BLD.to(device) for x_BLD in source.held_out()), len(kept))
                rows += rows_at(at, found.summary())
                if len(found.feature_n) == found.n_alive:
                    kept = replace(kept, genuine_F=found.genuine_F()[kept.index_F])
            path = reading_path(folder, at)
            path.parent.mkdir(parents=True, exist_ok=True)
            save_reading(kept, path)
        readings.append(reading)
    return _cell_rows(cell, stored.sites, readings) + rows


def new_dictionary(arm: Arm, source: Source, budget: DictionaryBudget, *, seed: int) -> Any:
    """An untrained dictionary of one arm that fits the activations of `source` and carries their scales."""
    settings = budget.settings(arm)
    if isinstance(source, StackedSource):
        settings["structure"] = Diffing(source.layer_counts, source.widths)
    dictionary = DICTIONARIES[CLASSES[arm]](n_layers=source.n_layers, d_model=source.d_model, seed=seed, **settings)
    dictionary.set_input(source.scale_L, source.reads)
    return dictionary


def fit(
    arm: Arm,
    source: Source,
    budget: DictionaryBudget,
    *,
    seed: int,
    training: TrainConfig | None = None,
    label: str = "",
    device: str = "cpu",
) -> tuple[Any, Callable[[], Iterator[Tensor]]]:
    """A dictionary trained on `source`, and what gives the held-out batches, each time from the first on.

    training: the trainer's settings where they are not the budget's.
    """
    (dictionary,) = fit_many(arm, source, [(budget, seed)], training=training, label=label, device=device)
    return dictionary, lambda: (x_BLD.to(device) for x_BLD in source.held_out())


def fit_many(
    arm: Arm,
    source: Source,
    plans: Sequence[tuple[DictionaryBudget, int]],
    *,
    training: TrainConfig | None = None,
    label: str = "",
    device: str = "cpu",
) -> list[Dictionary]:
    """A dictionary of each budget and seed, trained on the same batches side by side; the same numbers as one by one.

    Budgets may differ in size and k alone: the first says how all are trained.
    """
    first = plans[0][0]
    dictionaries = [new_dictionary(arm, source, budget, seed=seed) for budget, seed in plans]
    batches = source.batches(first.batch, seed=first.data_seed, steps=first.steps)
    given: dict[str, Any] = {"config": training or first.train_config(), "device": device, "quiet": True}
    if first.trainer(arm) is train_warm_chain:
        for dictionary in dictionaries:
            train_warm_chain(dictionary, batches, label=label, **given)
    else:
        train_many(dictionaries, batches, label=label, **given)
    return dictionaries


def marked(source: Source, device: str) -> Iterator[Marked]:
    """All held-out tokens of a source on a device, outliers marked."""
    return (Marked(*(tensor.to(device) for tensor in batch[:3]), batch.token_B) for batch in source.marked())


def probe(
    dictionary: Dictionary, held_out: Callable[[], Iterator[Tensor]], n_features: int, **settings: Any
) -> probes.FunctionalSpread:
    """From which layers features are read: all of them, or a sample where `n_features` are too many."""
    drawn = None if n_features <= MOST_PROBED else MOST_PROBED
    return probes.measure_functional_spread(dictionary, held_out, n_features=drawn, **settings)


def dictionary_rows(at: Place, dictionary: Dictionary, reading: Reading) -> list[Row]:
    """What one trained dictionary counts, explains and, where features extend over layers, how they do."""
    is_batch = isinstance(dictionary.config.sparsity, BatchTopK)
    values = counting.count_features(reading) | {
        "explained_variance": reading.explained_variance,
        "explained_variance_per_layer": [finite(value) for value in reading.explained_variance_L],
        "l0_token": reading.l0,
        "l0_token_layer": reading.l0_layer,
        "threshold": dictionary.threshold.tolist() if is_batch else None,
    }
    if (found := reading.outliers) is not None:
        values |= {
            "explained_variance_usual": finite(found.explained_variance_usual),
            "explained_variance_every": found.explained_variance_every,
            "outlier_share": found.share,
            "outlier_share_per_layer": found.share_L.tolist(),
            "outlier_energy_per_layer": found.energy_L.tolist(),
        }
    if reading.n_groups == 1:
        values |= profile.describe_profiles(reading.decoder_FLD)
    return rows_at(at, values)


def _cell_rows(cell: Cell, sites: tuple[int, ...], readings: list[Reading]) -> list[Row]:
    """What all seeds of a cell share, and how they agree."""
    values = {
        "tokens_train": cell.budget.steps * cell.budget.batch,
        "tokens_held_out": readings[0].n_tokens,
        "p_min": minimum_probability(readings[0].n_tokens),
        **counting.compare_seeds(readings),
    }
    if readings[0].n_groups == 1:
        values |= {"profile_heatmap": profile.heatmap(readings[0].profile_FL), "layers": [str(site) for site in sites]}
    return rows_at(cell.place, values)


def joint_rows(cell: Cell, source: StackedSource, seed: int, *, device: str = "cpu") -> list[Row]:
    """What one seed's crosscoder over two subjects says of which features are one subject's alone.

    Decoder energies are compared in units in which every layer has the same mean square.
    """
    at = replace(cell.place, seed=seed)
    dictionary, held_out = fit(cell.arm, source, cell.budget, seed=seed, label=file_name(at), device=device)
    reading = read_dictionary(dictionary, marked(source, device))
    assert reading.token_T is not None
    found = probe(dictionary, held_out, len(reading), document_T=reading.token_T // source.context)
    n_first = source.layer_counts[0]
    energy_L1 = np.sqrt(source.energy_L)[:, None]
    profile_FL = profile.layer_profile(dictionary.decoder_FLD().float().cpu().numpy() / energy_L1)
    own = universality.exclusive_shares(profile_FL[reading.index_F], n_first)
    hidden = universality.hidden_shares(profile_FL[found.feature_n], found.auc_nL, n_first)
    values = {
        "alive": len(reading),
        "dead_share": reading.dead_share,
        "l0_token": reading.l0,
        "explained_variance_first": reading.explained_variance_L[:n_first].mean(),
        "explained_variance_second": reading.explained_variance_L[n_first:].mean(),
        "exclusive_first": own[0],
        "exclusive_second": own[1],
        "hidden_first": hidden[0],
        "hidden_second": hidden[1],
    }
    return rows_at(at, values)


def evaluate_dictionary(dictionary: Dictionary, source: Source, *, device: str = "cpu") -> Reading:
    """The reading of a trained dictionary on the held-out tokens of a source.

    The source is to be at the dictionary's own scale: `SiteSource(..., scale_L=dictionary.input_scale)`.

    Raises:
        MismatchError: the source holds something else than what the dictionary reads, or is at another scale.
    """
    require_same(dictionary.reads, source.reads, owner="the dictionary", given="the activations")
    shape, expected = (source.n_layers, source.d_model), (dictionary.config.n_layers, dictionary.config.d_model)
    if shape != expected:
        raise MismatchError(
            f"the activations have {shape[0]} layers of width {shape[1]} (sites {list(source.sites)}), the dictionary "
            f"reads {expected[0]} of width {expected[1]}; choose its --layers"
        )
    if not torch.allclose(source.scale_L, dictionary.input_scale.cpu(), rtol=1e-5):
        raise MismatchError("the activations are at another scale than the dictionary's inputs; give its input_scale")
    return read_dictionary(dictionary, marked(source, device))


def _splice(
    at: Place, dictionary: Dictionary, sites: tuple[int, ...], stores: Stores, device: str, *, each: bool
) -> list[Row]:
    from safetensors.torch import load_file

    assert stores.subject is not None
    assert stores.held_out_ids is not None
    assert at.site is not None
    model = load_model(stores.subject, **asdict(stores.loading), device=device)
    ids = load_file(stores.held_out_ids)["ids"].long().to(input_device(model)).split(16)
    blocks = list(find_blocks(model, stores.blocks_path))
    found = splice_losses(dictionary, model, blocks, ids, layers=sites, kind=at.site, each=each)
    spliced = [row for layer, numbers in found.sites.items() for row in rows_at(replace(at, layer=layer), numbers)]
    return rows_at(at, found.clean) + spliced
