"""The settings of a dictionary, and what follows from them without making one."""

from __future__ import annotations

from dataclasses import fields
from itertools import pairwise
from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeInt, PositiveInt

from crosscoder.dictionary.sparsity import BatchTopK, Sparsity, TopK
from crosscoder.dictionary.structure import Acausal, AnyStructure, Masks
from crosscoder.foundation.config import config

MOST_LAYERS = 10_000
"""More than any stack of models has; tables of layers by layers are made."""


@config
class DictionaryConfig:
    """Shape and behaviour of a dictionary. `n_features` is per layer for a bank.

    decoder: `unit` keeps every feature's whole decoder row (all its layers together) at norm 1; `free` leaves it.
    selection_weight: what scores are multiplied by when choosing the active features: nothing, the norm of the
        feature's whole decoder row (`l2`), or the sum over layers of its norms (`l1`, Lindsey et al. 2024).
    aux_k: dead features asked to reconstruct the residual (AuxK, Gao et al. 2024, section A.2); None chooses half the
        width that one feature reads, at most 512; 0 turns the term off.
    prefixes: fractions of the features, ascending, that must also reconstruct alone: the first ones by index
        (Matryoshka, Bussmann et al. 2025); with any sparsity rule. None by default.
    seed: of the initial decoder directions.
    structure: which layers each feature of a crosscoder reads and writes, see `structure`. A bank takes the default.
    initial: `independent` draws a direction for each layer of a feature; `same` draws one for all of its layers, so
        that a bank's SAEs all start alike.
    shared: a bank whose layers are one and the same SAE (MLSAE); a crosscoder takes the default.
    """

    n_layers: Annotated[PositiveInt, Field(le=MOST_LAYERS)]
    d_model: PositiveInt
    n_features: PositiveInt
    sparsity: Sparsity = TopK()
    decoder: Literal["unit", "free"] = "unit"
    selection_weight: Literal["none", "l2", "l1"] = "none"
    aux_k: NonNegativeInt | None = None
    prefixes: tuple[float, ...] = ()
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    structure: AnyStructure = Acausal()
    initial: Literal["independent", "same"] = "independent"
    shared: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.sparsity, TopK | BatchTopK) and self.sparsity.k > self.n_features:
            raise ValueError(
                f"k = {self.sparsity.k} active features cannot come from n_features = {self.n_features}; "
                "lower k or raise n_features"
            )
        if self.selection_weight != "none" and not isinstance(self.sparsity, TopK | BatchTopK):
            raise ValueError(
                f"selection_weight is {self.selection_weight!r}, but {type(self.sparsity).__name__} does not rank "
                "features; use 'none'"
            )
        is_fraction = all(0 < one < 1 for one in self.prefixes)
        sizes = (0, *(self.prefix_sizes() if is_fraction else self.prefixes), self.n_features)
        if not is_fraction or any(a >= b for a, b in pairwise(sizes)):
            raise ValueError(
                f"prefixes are {self.prefixes!r}, which are {sizes[1:-1]} of {self.n_features} features; expected a "
                "tuple of rising fractions between 0 and 1, such as (0.125, 0.25, 0.5)"
            )
        self.structure.layer_widths(self.n_layers, self.d_model)
        needed = len(self.structure.spans(self.n_layers))
        if self.n_features < needed:
            name = type(self.structure).__name__
            raise ValueError(f"{name} deals its features out over {needed} layers; n_features is {self.n_features}")

    def settings(self) -> dict[str, Any]:
        """Every setting by name: the keyword arguments that make this config, or a dictionary that has it."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def prefix_sizes(self) -> tuple[int, ...]:
        """How many features each of `prefixes` holds, at each layer in a bank."""
        return tuple(round(fraction * self.n_features) for fraction in self.prefixes)

    def masks(self) -> Masks | None:
        """Which weights of a crosscoder exist; None where all do."""
        return self.structure.masks(self.n_features, self.n_layers, self.d_model)

    def written(self) -> slice:
        """The layers that are reconstructed, all from the first one on; the others count in no error."""
        _, writes = self.structure.spans(self.n_layers)[0]
        return slice(writes.start, None)

    def n_written(self) -> int:
        """How many numbers of a token are reconstructed: L * D, without padding and layers that nobody writes."""
        return sum(self.structure.layer_widths(self.n_layers, self.d_model)[self.written()])

    def n_read(self) -> int:
        """The most numbers of a token that one feature of a crosscoder reads."""
        reads, _ = self.structure.spans(self.n_layers)[0]
        return sum(self.structure.layer_widths(self.n_layers, self.d_model)[reads.start : reads.stop])
