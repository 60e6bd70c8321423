"""One cell of a study: one arm on one activation store, trained with every seed, measured and counted.

A cell's result is plain values, so that cells can run in any process and order, be kept as JSON, and be skipped
when a study is started again. Both arms of a comparison read the same tokens in the same order: the order depends
on the data seed, never on the dictionary's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

from torch import Tensor

from crosscoder.data.residuals import find_blocks
from crosscoder.data.shards import ActivationShards, stored_source
from crosscoder.data.sources import ShuffledSource, SiteSource, Source, held_out_batches
from crosscoder.dictionary import DICTIONARIES, BatchTopK
from crosscoder.measure import counting, probes
from crosscoder.measure.reading import (
    Measured,
    Reading,
    alive_features,
    measure_dictionary,
    minimum_probability,
    read_dictionary,
    save_reading,
)
from crosscoder.measure.splice import splice_losses
from crosscoder.studies import cell_values
from crosscoder.studies.budget import CLASSES, Arm, DictionaryBudget, PartialStructure, WholeStructure
from crosscoder.studies.cell_values import Trained, finite

Site = Literal["residual", "write"]
State = Literal["trained", "untrained", "shuffled"]  # shuffled: trained, each layer's tokens in an order of its own
Role = Literal["main", "size", "k"]
SHUFFLE_SEED = 1
MOST_PROBED = 2048  # features; of larger dictionaries so many are drawn at random
_SPREAD_IDENTITY = ("subject", "state", "site", "n_features", "k", "training_seed")


@dataclass(frozen=True, kw_only=True)
class Stores:
    """Where a subject's activations lie, and what a spliced evaluation needs of it."""

    train: Path
    held_out: Path
    subject: Path | str | None = None
    """Folder or name of the subject, for splicing; None leaves splicing out."""
    held_out_ids: Path | None = None
    """Token blocks `[n, S]` to splice on, as safetensors."""
    blocks_path: str | None = None

    def source(self, site: Site) -> SiteSource:
        """The activations of one site; hashes are not checked again."""
        return stored_source(self.train, self.held_out, site, verify=False)


@dataclass(frozen=True, kw_only=True)
class Cell:
    """What is trained: one arm on one site of one subject in one state."""

    subject: str
    state: State
    site: Site
    arm: Arm
    role: Role
    budget: DictionaryBudget
    seeds: tuple[int, ...] = (0, 1)
    training_seed: int = 0
    """Position of the subject's training seed in the study's list."""
    probed: bool = False
    """Whether it is measured what the features of a crosscoder are read from, and whether one layer would tell."""

    def __post_init__(self) -> None:
        if self.budget.structure in get_args(PartialStructure):
            raise ValueError(
                f"a crosscoder that is {self.budget.structure} leaves layers out, and a study compares all layers; use "
                f"one of {get_args(WholeStructure)}, or train it by itself"
            )

    @property
    def name(self) -> str:
        """A file name that tells the cells of one study apart."""
        k = self.budget.k(self.arm)
        run = f"{self.subject}{self.training_seed}"
        return f"{run}-{self.state}-{self.site}-{self.arm}-n{self.budget.n_features}-k{k}"

    @property
    def compared(self) -> bool:
        """Whether its dictionaries are read by the verdict: the main crosscoders."""
        return self.role == "main" and self.arm == "crosscoder"

    def reading_name(self, seed: int) -> str:
        """The file that one seed's reading is kept in."""
        return f"{self.name}-seed{seed}.safetensors"

    def identity(self) -> dict[str, Any]:
        """The columns that say which cell a row of results belongs to."""
        return {
            "subject": self.subject,
            "state": self.state,
            "site": self.site,
            "arm": self.arm,
            "role": self.role,
            "n_features": self.budget.n_features,
            "k": self.budget.k(self.arm),
            "training_seed": self.training_seed,
        }


def run_cell(
    cell: Cell,
    stores: Stores,
    *,
    device: str = "cpu",
    save_to: Path | None = None,
    readings_to: Path | None = None,
) -> dict[str, Any]:
    """Train, measure and count every seed of `cell`; the result's keys are documented in docs/results.md.

    Readings of compared cells are kept in `readings_to`, dictionaries in `save_to`.
    """
    stored = stores.source(cell.site)
    source = ShuffledSource(stored, SHUFFLE_SEED) if cell.state == "shuffled" else stored
    homes = save_to, readings_to
    trained = [_train_seed(cell, seed, source, stored.sites, stores, device, homes) for seed in cell.seeds]
    n_held_out = trained[0].measured.activity.n_tokens
    counts = [cell_values.count(cell.arm, one) for one in trained]
    quality = [cell_values.quality(cell.arm, one) for one in trained]
    result: dict[str, Any] = {
        "counts": {
            **cell.identity(),
            "tokens_train": cell.budget.steps * cell.budget.batch,
            "tokens_held_out": n_held_out,
            "p_min": minimum_probability(n_held_out),
            "per_seed": counts,
            "pair": cell_values.compare_seeds(cell.arm, trained),
            "summary": cell_values.summarize(counts),
        },
        "quality": {**cell.identity(), "per_seed": quality, "summary": cell_values.summarize(quality)},
        "spread": None,
    }
    if cell.arm == "crosscoder":
        spread = [cell_values.spread(one) for one in trained]
        result["spread"] = {
            **{key: cell.identity()[key] for key in _SPREAD_IDENTITY},
            "role": cell.role,
            "per_seed": spread,
            "heatmap": cell_values.heatmap(trained[0]),
            "layers": [str(site) for site in stored.sites],
            "summary": cell_values.summarize(spread),
        }
    return result


def new_dictionary(arm: Arm, source: Source, budget: DictionaryBudget, *, seed: int) -> Any:
    """An untrained dictionary of one arm that fits the activations of `source` and carries their scales."""
    dictionary = DICTIONARIES[CLASSES[arm]](
        n_layers=source.n_layers,
        d_model=source.d_model,
        seed=seed,
        **budget.settings(arm),
    )
    dictionary.input_scale.copy_(source.scale_L)
    return dictionary


def _train_seed(
    cell: Cell,
    seed: int,
    source: Source,
    sites: tuple[int, ...],
    stores: Stores,
    device: str,
    homes: tuple[Path | None, Path | None],
) -> Trained:
    save_to, readings_to = homes
    budget = cell.budget
    dictionary = new_dictionary(cell.arm, source, budget, seed=seed)
    batches = source.batches(budget.batch, seed=budget.data_seed, steps=budget.steps)

    def held() -> Iterator[Tensor]:
        return (x.to(device) for x in source.held_out())

    label = f"{cell.name} seed {seed}"
    train = budget.trainer(cell.arm)
    train(dictionary, batches, config=budget.train_config(), device=device, label=label, quiet=True)
    measured = measure_dictionary(dictionary, held())
    splice = None
    if stores.subject is not None and seed == cell.seeds[0]:
        splice = _splice(cell, dictionary, sites, stores, device)
    if save_to is not None:
        dictionary.save_pretrained(save_to / f"{cell.name}-seed{seed}")
    one = _describe_dictionary(dictionary, measured, seed=seed, splice=splice)
    if cell.compared and readings_to is not None:
        one = _keep_reading(cell, one, dictionary, held, readings_to)
    return one


def _keep_reading(
    cell: Cell, one: Trained, dictionary: Any, held: Callable[[], Iterator[Tensor]], home: Path
) -> Trained:
    """Write the reading of a compared dictionary; where that is probed, with what its features are read from."""
    reading: Reading = read_dictionary(one.measured, one.decoder, seed=one.seed)
    if cell.probed and len(reading) and one.decoder.shape[1] > 1:
        config = probes.ProbeConfig(n_features=None if reading.decoder_FLD.shape[0] <= MOST_PROBED else MOST_PROBED)
        found = probes.measure_functional_spread(dictionary, held, config=config)
        one = replace(one, functional={key: finite(value) for key, value in found.summary().items()})
        if config.n_features is None and reading.index_F is not None:
            reading = replace(reading, genuine_F=found.genuine_F()[reading.index_F])
    home.mkdir(parents=True, exist_ok=True)
    save_reading(reading, home / cell.reading_name(one.seed))
    return one


def _describe_dictionary(
    dictionary: Any, measured: Measured, *, seed: int, splice: dict[str, Any] | None = None
) -> Trained:
    alive_GF = alive_features(measured.activity)
    decoder_GFN = dictionary.grouped().decoder_GFN.detach().float().cpu()
    groups = decoder_GFN.expand(len(alive_GF), -1, -1).numpy()  # layers that share an SAE share its decoder
    layers = [
        counting.LayerFeatures(groups[g][alive], measured.activity.group(g)[:, alive.nonzero()[0]])
        for g, alive in enumerate(alive_GF)
    ]
    is_batch = isinstance(dictionary.config.sparsity, BatchTopK)
    threshold = dictionary.threshold.tolist() if is_batch else None
    decoder = dictionary.decoder_FLD().float().cpu().numpy()
    return Trained(seed, measured, alive_GF, decoder, layers, threshold, splice)


def evaluate_dictionary(dictionary: Any, held_out: ActivationShards, *, site: Site, device: str) -> dict[str, Any]:
    """Quality and counts of a trained dictionary on a held-out store, as one seed's rows of a study."""
    arm: Arm = "crosscoder" if type(dictionary).__name__ == CLASSES["crosscoder"] else "layerwise"
    scale_L = dictionary.input_scale.cpu()
    batches = (x.to(device) for x in held_out_batches(held_out, site, scale_L))
    one = _describe_dictionary(dictionary, measure_dictionary(dictionary, batches), seed=dictionary.config.seed)
    spread = cell_values.spread(one) if arm == "crosscoder" else None
    return {"counts": cell_values.count(arm, one), "quality": cell_values.quality(arm, one), "spread": spread}


def _splice(cell: Cell, dictionary: Any, sites: tuple[int, ...], stores: Stores, device: str) -> dict[str, Any]:
    from safetensors.torch import load_file

    from crosscoder.data.subject import load_model

    assert stores.subject is not None
    assert stores.held_out_ids is not None
    model = load_model(stores.subject, device=device)
    ids = load_file(stores.held_out_ids)["ids"].long().to(device).split(16)
    blocks = find_blocks(model, stores.blocks_path)
    return splice_losses(dictionary, model, list(blocks), ids, layers=sites, kind=cell.site)
