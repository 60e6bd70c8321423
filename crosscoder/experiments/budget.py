"""What each dictionary of a comparison is given: size, sparsity, steps, tokens."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from crosscoder.dictionary import BatchTopK, Sparsity, TopK
from crosscoder.training import TrainConfig

Arm = Literal["crosscoder", "layerwise"]
CLASSES: dict[str, str] = {"crosscoder": "Crosscoder", "layerwise": "LayerwiseSAE"}


@dataclass(frozen=True, kw_only=True)
class DictionaryBudget:
    """What both arms are given. One crosscoder of n features and L SAEs of n each have equal parameters and FLOPs."""

    n_features: int = 512
    """Features of the crosscoder, and of each layer's SAE."""
    k_crosscoder: int = 40
    """Features active per token, over all layers."""
    k_layerwise: int = 26
    """Features active per token and layer."""
    selection: Literal["batch_topk", "topk"] = "batch_topk"
    steps: int = 540
    batch: int = 512
    learning_rate: float = 3.5e-3
    precision: Literal["fp32", "bf16"] = "fp32"
    dead_after_tokens: int = 10_000
    data_seed: int = 0

    def __post_init__(self) -> None:
        for name in ("n_features", "k_crosscoder", "k_layerwise", "steps", "batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected at least 1")
        most = max(self.k_crosscoder, self.k_layerwise)
        if most > self.n_features:
            raise ValueError(f"k = {most} is more than n_features = {self.n_features}; lower k or raise n_features")

    def sparsity(self, arm: Arm) -> Sparsity:
        """The selection rule of one arm."""
        k = self.k_crosscoder if arm == "crosscoder" else self.k_layerwise
        return TopK(k=k) if self.selection == "topk" else BatchTopK(k=k)

    def train_config(self) -> TrainConfig:
        """The trainer's settings, the same for both arms."""
        return TrainConfig(
            steps=self.steps,
            learning_rate=self.learning_rate,
            warmup_steps=max(1, self.steps // 5),
            dead_after_tokens=self.dead_after_tokens,
            precision=self.precision,
            log_every=max(1, self.steps // 20),
        )


def with_size(budget: DictionaryBudget, n_features: int) -> DictionaryBudget:
    """The budget with another dictionary size; k is lowered only where it would not fit."""
    return replace(
        budget,
        n_features=n_features,
        k_crosscoder=min(budget.k_crosscoder, n_features),
        k_layerwise=min(budget.k_layerwise, n_features),
    )


def with_k(budget: DictionaryBudget, factor: float) -> DictionaryBudget:
    """The budget with both k multiplied by `factor`."""
    return replace(
        budget,
        k_crosscoder=max(1, round(budget.k_crosscoder * factor)),
        k_layerwise=max(1, round(budget.k_layerwise * factor)),
    )
