"""Which layers each feature reads and which it writes: frozen settings of a crosscoder, each with its source.

A structure is two masks over (feature, layer). Weights outside them are 0, get no gradient and stay 0. Features are
dealt out by index in turns, so that every prefix of a dictionary holds all kinds in their proportions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveInt
from torch import Tensor

from crosscoder.foundation.config import config


class Masks(NamedTuple):
    """What each feature may use, as booleans `[F, L, 1]`, or `[F, L, D]` where some columns are padding."""

    read: Tensor
    write: Tensor


class Structure:
    """What can be asked of every structure; the answers here are those of features that read and write all layers."""

    def spans(self, n_layers: int) -> list[tuple[range, range]]:
        """Layers read and layers written, by base layer; feature i has base layer i modulo the length."""
        return [(range(n_layers), range(n_layers))]

    def layer_widths(self, n_layers: int, d_model: int) -> tuple[int, ...]:
        """How many numbers each layer has, padding left out; a ValueError where this shape does not fit."""
        return (d_model,) * n_layers

    def masks(self, n_features: int, n_layers: int, d_model: int) -> Masks | None:
        """Which weights exist; None where all do."""
        spans = self.spans(n_layers)
        table_2BL = torch.tensor(
            [[[layer in span for layer in range(n_layers)] for span in kind] for kind in zip(*spans)]
        )
        read_FL, write_FL = table_2BL[:, torch.arange(n_features) % len(spans)]
        return Masks(read_FL[:, :, None], write_FL[:, :, None])


@config
class Acausal(Structure):
    """Every feature reads and writes all layers (Lindsey et al. 2024, "Sparse Crosscoders", the plain crosscoder)."""

    def masks(self, n_features: int, n_layers: int, d_model: int) -> None:
        return None


@config
class WeaklyCausal(Structure):
    """Feature i reads layer l(i) and writes that layer and all later ones (Lindsey et al. 2024, "Crosscoder variants").

    `f_i = rule(<E_i, x_l(i)>)`, `recon_l = sum over i with l(i) <= l of f_i W_il`. Base layers are dealt out evenly:
    `l(i) = i mod L`.
    """

    def spans(self, n_layers: int) -> list[tuple[range, range]]:
        return [(range(base, base + 1), range(base, n_layers)) for base in range(n_layers)]


@config
class StrictlyCausal(Structure):
    """Feature i reads layer l(i) and writes the later ones alone (Lindsey et al. 2024, "Crosscoder variants").

    `l(i) = i mod (L - 1)`: a feature of the last layer would write nothing. Nobody writes layer 0. It is read, it is
    no part of the loss or of explained variance, and its reconstruction is the decoder bias.
    """

    def spans(self, n_layers: int) -> list[tuple[range, range]]:
        if n_layers < 2:
            raise ValueError(f"StrictlyCausal needs a layer to read and a later one to write; n_layers is {n_layers}")
        return [(range(base, base + 1), range(base + 1, n_layers)) for base in range(n_layers - 1)]


@config(kw_only=False)
class LocalWindow(Structure):
    """Feature i reads and writes `width` neighbouring layers (the locality ladder of Lindsey et al. 2024).

    It begins at layer `i mod (L - width + 1)`, so that every window is whole; inner layers are in more windows than
    outer ones. Width L is `Acausal`; with width 1 features are those of a bank, chosen together.
    """

    width: PositiveInt

    def spans(self, n_layers: int) -> list[tuple[range, range]]:
        if self.width > n_layers:
            raise ValueError(f"a window of {self.width} layers does not fit n_layers = {n_layers}; lower the width")
        windows = [range(base, base + self.width) for base in range(n_layers - self.width + 1)]
        return list(zip(windows, windows, strict=True))


@config
class Transcoder(Structure):
    """Cross-layer transcoder (Ameisen et al. 2025, "Circuit Tracing"; one layer: Dunefsky et al. 2024, 2406.11944).

    The layer axis is [what L MLPs read ; what they write], 2 L in all. Feature i reads input `l(i) = i mod L` and
    writes the outputs from l(i) on: `y_l = sum over i with l(i) <= l of f_i W_il + bias`. Inputs are not reconstructed:
    they are no part of the loss or of explained variance, and their reconstruction is the decoder bias.
    """

    def spans(self, n_layers: int) -> list[tuple[range, range]]:
        if n_layers % 2:
            raise ValueError(
                f"Transcoder stacks as many outputs as inputs; n_layers is {n_layers}, expected an even number"
            )
        return [(range(base, base + 1), range(base + n_layers // 2, n_layers)) for base in range(n_layers // 2)]


@config(kw_only=False)
class Diffing(Structure):
    """Several subjects stacked on the layer axis, [A's layers ; B's layers], also of different depth and width.

    The model-diffing crosscoder of Lindsey et al. 2024, with the dedicated features of Jiralerspong and Bricken 2026
    (arXiv 2602.11729): a share of the features reads and writes one subject alone, the others all. Narrow subjects
    are padded with zeros at the end (`stack_subjects`); padding is neither read nor written.

    n_layers, d_models: of each subject; they sum to the dictionary's layers, and the widest is its width.
    dedicated: the share of features of each subject's own; empty for none.
    """

    n_layers: Annotated[tuple[PositiveInt, ...], Field(min_length=1)]
    d_models: tuple[PositiveInt, ...]
    dedicated: tuple[Annotated[float, Field(ge=0, le=1)], ...] = ()

    def __post_init__(self) -> None:
        if len(self.n_layers) != len(self.d_models):
            raise ValueError(
                f"n_layers are {self.n_layers}, d_models {self.d_models}; expected one number of each for every subject"
            )
        if self.dedicated and len(self.dedicated) != len(self.n_layers):
            raise ValueError(
                f"dedicated has {len(self.dedicated)} shares for {len(self.n_layers)} subjects; give one for each"
            )
        if sum(self.dedicated) > 1:
            raise ValueError(f"dedicated is {self.dedicated}; expected shares that sum to at most 1")

    def layer_widths(self, n_layers: int, d_model: int) -> tuple[int, ...]:
        if sum(self.n_layers) != n_layers or max(self.d_models) != d_model:
            raise ValueError(
                f"subjects have {self.n_layers} layers of width {self.d_models}, the dictionary n_layers = {n_layers} "
                f"and d_model = {d_model}; expected their sum and their largest"
            )
        return tuple(d for depth, d in zip(self.n_layers, self.d_models) for _ in range(depth))

    def owners(self, n_features: int) -> Tensor:
        """The subject that each feature is dedicated to, int64 `[F]`; -1 where it is shared by all."""
        own = [round(share * n_features) for share in self.dedicated]
        counts = [max(0, n_features - sum(own)), *own]
        owner_F = torch.arange(-1, len(own)).repeat_interleave(torch.tensor(counts))[:n_features]
        place_F = torch.cat([(torch.arange(count) + 0.5) / max(1, count) for count in counts])[:n_features]
        return owner_F[place_F.argsort(stable=True)]

    def masks(self, n_features: int, n_layers: int, d_model: int) -> Masks:
        owner_F1 = self.owners(n_features)[:, None]
        subject_L = torch.arange(len(self.n_layers)).repeat_interleave(torch.tensor(self.n_layers))
        exists_LD = torch.arange(d_model) < torch.tensor(self.layer_widths(n_layers, d_model))[:, None]
        both_FLD = ((owner_F1 < 0) | (owner_F1 == subject_L))[:, :, None] & exists_LD
        return Masks(both_FLD, both_FLD)


AnyStructure = Acausal | WeaklyCausal | StrictlyCausal | LocalWindow | Transcoder | Diffing


def stack_subjects(subjects: Sequence[Tensor]) -> Tensor:
    """The same tokens in several subjects, `[B, L_i, D_i]` each, as one batch `[B, sum of L_i, largest D_i]`.

    Narrow ones are padded with zeros at the end. Scale each subject first: its error counts as it comes.

    Raises:
        ValueError: there are no subjects, or they do not hold the same number of tokens.
    """
    shapes = [tuple(x.shape) for x in subjects]
    if not shapes or any(len(shape) != 3 or shape[0] != shapes[0][0] for shape in shapes):
        raise ValueError(f"subjects have shapes {shapes}; expected [B, L_i, D_i] each, with the same B tokens")
    d_model = max(shape[2] for shape in shapes)
    return torch.cat([F.pad(x, (0, d_model - x.shape[2])) for x in subjects], dim=1)
