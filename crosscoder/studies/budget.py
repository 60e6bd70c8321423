"""What each dictionary of a comparison is given: size, sparsity, steps, tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, NonNegativeInt, PositiveInt

from crosscoder.dictionary import (
    Acausal,
    BatchTopK,
    JumpReLU,
    LocalWindow,
    NormPenalty,
    ReLU,
    Sparsity,
    StrictlyCausal,
    Structure,
    TargetL0Penalty,
    TopK,
    Transcoder,
    WeaklyCausal,
)
from crosscoder.foundation.config import config
from crosscoder.results.table import Arm
from crosscoder.training import Frozen, TrainConfig, TrainResult, train, train_warm_chain

Selection = Literal["batch_topk", "topk", "jumprelu", "l1_of_norms", "l2_of_norms"]
WholeStructure = Literal["acausal", "weakly_causal", "window"]
PartialStructure = Literal["strictly_causal", "transcoder"]
StructureName = WholeStructure | PartialStructure
Bank = Literal["independent", "same_start", "warm_chain", "shared"]
HAS_PENALTY = ("jumprelu", "l1_of_norms", "l2_of_norms")
STRUCTURES: dict[StructureName, Callable[[int], Structure]] = {
    "acausal": lambda _: Acausal(),
    "weakly_causal": lambda _: WeaklyCausal(),
    "strictly_causal": lambda _: StrictlyCausal(),
    "window": LocalWindow,
    "transcoder": lambda _: Transcoder(),
}
CLASSES: dict[Arm, str] = {"crosscoder": "Crosscoder", "layerwise": "LayerwiseSAE"}
SPANNING: tuple[Arm, ...] = ("crosscoder",)
"""Arms whose features extend over layers."""


def _all_different(seeds: tuple[int, ...]) -> tuple[int, ...]:
    if not seeds or len(set(seeds)) != len(seeds):
        raise ValueError(f"seeds are {seeds}; expected at least one, all different")
    return seeds


Seeds = Annotated[tuple[int, ...], AfterValidator(_all_different)]
"""At least one seed, none twice."""


@config
class DictionaryBudget:
    """What both arms are given. One crosscoder of n features and L SAEs of n each have equal parameters and FLOPs."""

    n_features: PositiveInt = 512
    """Features of the crosscoder, and of each layer's SAE."""
    n_layerwise: PositiveInt | None = None
    """Features of each layer's SAE where they are not as many as the crosscoder's."""
    k_crosscoder: PositiveInt = 40
    """Features active per token, over all layers. A penalty of norms does not use it."""
    k_layerwise: PositiveInt = 26
    """Features active per token and layer. A penalty of norms does not use it."""
    selection: Selection = "batch_topk"
    """batch_topk: the best B * k of a batch of B tokens. topk: the best k of each token. jumprelu: a learned threshold
    for each feature, with a penalty that aims at k. l1_of_norms, l2_of_norms: every positive one, with a penalty on
    value times decoder norm, summed over layers or of all layers together; decoders are free."""
    penalty: float | None = None
    """Coefficient of the penalty of jumprelu, l1_of_norms or l2_of_norms. Default: the rule's own."""
    prefixes: tuple[float, ...] = ()
    """Rising fractions of the features, such as 0.125 0.25 0.5, that must also reconstruct alone (Matryoshka)."""
    structure: StructureName = "acausal"
    """What the crosscoder's features read and write. acausal: all layers. weakly_causal: read one, write it and later
    ones. strictly_causal: read one, write later ones, so that layer 0 is left out. window: `window` neighbours.
    transcoder: read one MLP's input, write its output and later ones; for stores made with `harvest --reads mlp`."""
    window: PositiveInt = 2
    """Layers of a window."""
    bank: Bank = "independent"
    """How the bank's SAEs begin. independent: each by itself. same_start: all alike. warm_chain: each from the trained
    one before it. shared: there is one, for all layers (MLSAE)."""
    resample_every: NonNegativeInt = 0
    """Steps between two resamplings of dead features, 0 for none; for l1_of_norms and l2_of_norms."""
    frozen: Frozen = "none"
    """Nulls whose features are not learnt. encoder, decoder: it stays at its random start. soft_decoder: its rows stay
    within cosine .8 of theirs. What these show too, learnt features do not explain. Not with resample_every or
    warm_chain."""
    steps: PositiveInt = 540
    batch: PositiveInt = 512
    learning_rate: float = 3.5e-3
    precision: Literal["fp32", "bf16"] = "fp32"
    dead_after_tokens: int = 10_000
    data_seed: int = 0

    def __post_init__(self) -> None:
        for arm in CLASSES:
            if self.k(arm) > self.n(arm):
                raise ValueError(
                    f"k_{arm} = {self.k(arm)} is more than the {self.n(arm)} features; lower k or raise n_features"
                )
        if self.penalty is not None and self.selection not in HAS_PENALTY:
            raise ValueError(f"penalty is {self.penalty}, but {self.selection} has none; try one of {HAS_PENALTY}")
        self.train_config()

    def n(self, arm: Arm) -> int:
        """Features of one arm's dictionary, of a bank's SAE."""
        return self.n_layerwise or self.n_features if arm == "layerwise" else self.n_features

    def k(self, arm: Arm) -> int:
        """Features active per row of one arm, by construction or as the aim."""
        return getattr(self, f"k_{arm}")

    def sparsity(self, arm: Arm) -> Sparsity:
        coefficient = {} if self.penalty is None else {"coefficient": self.penalty}
        match self.selection:
            case "topk":
                return TopK(k=self.k(arm))
            case "batch_topk":
                return BatchTopK(k=self.k(arm))
            case "jumprelu":
                return JumpReLU(penalty=TargetL0Penalty(target=self.k(arm), **coefficient))
            case "l1_of_norms" | "l2_of_norms":
                return ReLU(NormPenalty(norm="l1" if self.selection == "l1_of_norms" else "l2", **coefficient))

    def settings(self, arm: Arm) -> dict[str, Any]:
        """Keyword arguments of one arm's dictionary, all but its shape and seed."""
        initial = "same" if self.bank == "same_start" else "independent"
        own: dict[Arm, dict[str, Any]] = {
            "crosscoder": {"structure": STRUCTURES[self.structure](self.window)},
            "layerwise": {"initial": initial, "shared": self.bank == "shared"},
        }
        return {
            "n_features": self.n(arm),
            "sparsity": self.sparsity(arm),
            # Norms are held at 1, except where the penalty weighs them.
            "decoder": "free" if self.selection.endswith("of_norms") else "unit",
            "prefixes": self.prefixes,
            **own[arm],
        }

    def trainer(self, arm: Arm) -> Callable[..., TrainResult]:
        """What trains one arm: `train`, or for a warm-started bank `train_warm_chain`."""
        return train_warm_chain if (arm, self.bank) == ("layerwise", "warm_chain") else train

    def train_config(self) -> TrainConfig:
        """The trainer's settings, the same for both arms."""
        return TrainConfig(
            steps=self.steps,
            learning_rate=self.learning_rate,
            warmup_steps=max(1, self.steps // 5),
            penalty_warmup_steps=max(1, self.steps // 5),
            dead_after_tokens=self.dead_after_tokens,
            resample_every=self.resample_every,
            frozen=self.frozen,
            precision=self.precision,
            log_every=max(1, self.steps // 20),
        )


def of_size(budget: DictionaryBudget, n_features: int) -> DictionaryBudget:
    """The budget with another crosscoder size; k is lowered only where it would not fit."""
    return replace(budget, n_features=n_features, k_crosscoder=min(budget.k_crosscoder, n_features))


def of_other_k(budget: DictionaryBudget, arm: Arm, ks: Sequence[float]) -> tuple[DictionaryBudget, ...]:
    """The budgets of other k of one arm, rounded, as far as there are features, once each, its own left out."""
    possible = dict.fromkeys(max(1, min(round(k), budget.n(arm))) for k in ks)
    return tuple(replace(budget, **{f"k_{arm}": k}) for k in possible if k != budget.k(arm))
