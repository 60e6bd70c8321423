"""Which layers each feature reads and which it writes: frozen settings of a crosscoder, each with its source.

A structure is two masks over (feature, layer). Weights outside them are 0, get no gradient and stay 0. Features are
dealt out by index in turns, so that every prefix of a dictionary holds all kinds in their proportions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Acausal:
    """Every feature reads and writes all layers (Lindsey et al. 2024, "Sparse Crosscoders", the plain crosscoder)."""


@dataclass(frozen=True)
class WeaklyCausal:
    """Feature i reads layer l(i) and writes that layer and all later ones (Lindsey et al. 2024, "Crosscoder variants").

    `f_i = rule(<E_i, x_l(i)>)`, `recon_l = sum over i with l(i) <= l of f_i W_il`. Base layers are dealt out evenly:
    `l(i) = i mod L`.
    """


@dataclass(frozen=True)
class StrictlyCausal:
    """Feature i reads layer l(i) and writes the later ones alone (Lindsey et al. 2024, "Crosscoder variants").

    `l(i) = i mod (L - 1)`: a feature of the last layer would write nothing. Nobody writes layer 0. It is read, it is
    no part of the loss or of explained variance, and its reconstruction is the decoder bias.
    """


@dataclass(frozen=True)
class LocalWindow:
    """Feature i reads and writes `width` neighbouring layers (the locality ladder of Lindsey et al. 2024).

    It begins at layer `i mod (L - width + 1)`, so that every window is whole; inner layers are in more windows than
    outer ones. Width L is `Acausal`; with width 1 features are those of a bank, chosen together.
    """

    width: int

    def __post_init__(self) -> None:
        if isinstance(self.width, bool) or not isinstance(self.width, int) or self.width < 1:
            raise ValueError(f"width is {self.width!r}; expected a whole number of layers, at least 1")


@dataclass(frozen=True)
class Transcoder:
    """Cross-layer transcoder (Ameisen et al. 2025, "Circuit Tracing"; one layer: Dunefsky et al. 2024, 2406.11944).

    The layer axis is [what L MLPs read ; what they write], 2 L in all. Feature i reads input `l(i) = i mod L` and
    writes the outputs from l(i) on: `y_l = sum over i with l(i) <= l of f_i W_il + bias`. Inputs are not reconstructed:
    they are no part of the loss or of explained variance, and their reconstruction is the decoder bias.
    """


@dataclass(frozen=True)
class Diffing:
    """Several subjects stacked on the layer axis, [A's layers ; B's layers], also of different depth and width.

    The model-diffing crosscoder of Lindsey et al. 2024, with the dedicated features of Jiralerspong and Bricken 2026
    (arXiv 2602.11729): a share of the features reads and writes one subject alone, the others all. Narrow subjects
    are padded with zeros at the end (`stack_subjects`); padding is neither read nor written.

    n_layers, d_models: of each subject; they sum to the dictionary's layers, and the widest is its width.
    dedicated: the share of features of each subject's own; empty for none.
    """

    n_layers: tuple[int, ...]
    d_models: tuple[int, ...]
    dedicated: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        sizes = (*self.n_layers, *self.d_models)
        if len(self.n_layers) != len(self.d_models) or not sizes or min(sizes) < 1:
            raise ValueError(
                f"n_layers are {self.n_layers} and d_models {self.d_models}; expected one positive number of each for "
                "every subject"
            )
        if self.dedicated and len(self.dedicated) != len(self.n_layers):
            raise ValueError(
                f"dedicated has {len(self.dedicated)} shares for {len(self.n_layers)} subjects; give one for each, or "
                "none"
            )
        if any(not 0 <= share <= 1 for share in self.dedicated) or sum(self.dedicated) > 1:
            raise ValueError(f"dedicated is {self.dedicated}; expected shares from 0 that sum to at most 1")


Structure = Acausal | WeaklyCausal | StrictlyCausal | LocalWindow | Transcoder | Diffing


class Masks(NamedTuple):
    """What each feature may use, as booleans `[F, L, 1]`, or `[F, L, D]` where some columns are padding."""

    read: Tensor
    write: Tensor


def check_structure(structure: Structure, *, n_features: int, n_layers: int, d_model: int) -> None:
    """Refuses a structure that does not fit a dictionary.

    Raises:
        ValueError: says what does not fit, and what would.
    """
    name = type(structure).__name__
    match structure:
        case StrictlyCausal() if n_layers < 2:
            raise ValueError(f"{name} needs a layer to read and a later one to write; n_layers is {n_layers}")
        case LocalWindow(width=width) if width > n_layers:
            raise ValueError(f"a window of {width} layers does not fit n_layers = {n_layers}; lower the width")
        case Transcoder() if n_layers % 2:
            raise ValueError(
                f"{name} stacks as many outputs as inputs; n_layers is {n_layers}, expected an even number"
            )
        case Diffing() if sum(structure.n_layers) != n_layers or max(structure.d_models) != d_model:
            raise ValueError(
                f"subjects have {structure.n_layers} layers of width {structure.d_models}, the dictionary n_layers = "
                f"{n_layers} and d_model = {d_model}; expected their sum and their largest"
            )
    needed = n_bases(structure, n_layers)
    if n_features < needed:
        raise ValueError(f"{name} deals its features out over {needed} layers; n_features is {n_features}")


def n_bases(structure: Structure, n_layers: int) -> int:
    """Over how many base layers the features are dealt out: feature i has base layer `i mod n_bases`."""
    match structure:
        case WeaklyCausal():
            return n_layers
        case StrictlyCausal():
            return n_layers - 1
        case LocalWindow(width=width):
            return n_layers - width + 1
        case Transcoder():
            return n_layers // 2
        case _:
            return 1


def feature_owners(structure: Diffing, n_features: int) -> Tensor:
    """The subject that each feature is dedicated to, int64 `[F]`; -1 where it is shared by all."""
    own = [round(share * n_features) for share in structure.dedicated]
    counts = [max(0, n_features - sum(own)), *own]
    owner_F = torch.arange(-1, len(own)).repeat_interleave(torch.tensor(counts))[:n_features]
    place_F = torch.cat([(torch.arange(count) + 0.5) / max(1, count) for count in counts])[:n_features]
    return owner_F[place_F.argsort(stable=True)]


def feature_masks(structure: Structure, *, n_features: int, n_layers: int, d_model: int) -> Masks | None:
    """The masks of a structure; None where nothing is masked."""
    base_F1 = torch.arange(n_features)[:, None] % n_bases(structure, n_layers)
    layer_L = torch.arange(n_layers)
    match structure:
        case Acausal():
            return None
        case WeaklyCausal():
            read, write = layer_L == base_F1, layer_L >= base_F1
        case StrictlyCausal():
            read, write = layer_L == base_F1, layer_L > base_F1
        case LocalWindow(width=width):
            read = write = (layer_L >= base_F1) & (layer_L < base_F1 + width)
        case Transcoder():
            read, write = layer_L == base_F1, layer_L >= base_F1 + n_layers // 2
        case Diffing():
            subject_L = torch.arange(len(structure.n_layers)).repeat_interleave(torch.tensor(structure.n_layers))
            owner_F1 = feature_owners(structure, n_features)[:, None]
            width_L = torch.tensor(structure.d_models)[subject_L]
            exists_LD = torch.arange(d_model) < width_L[:, None]
            both = ((owner_F1 < 0) | (owner_F1 == subject_L))[:, :, None] & exists_LD
            return Masks(both, both)
    return Masks(read[:, :, None], write[:, :, None])


def first_written(structure: Structure, n_layers: int) -> int:
    """The first layer that is reconstructed; all later ones are."""
    match structure:
        case StrictlyCausal():
            return 1
        case Transcoder():
            return n_layers // 2
        case _:
            return 0


def layer_widths(structure: Structure, *, n_layers: int, d_model: int) -> tuple[int, ...]:
    """How many numbers each layer has, padding left out."""
    if isinstance(structure, Diffing):
        return tuple(d for depth, d in zip(structure.n_layers, structure.d_models) for _ in range(depth))
    return (d_model,) * n_layers


def read_width(structure: Structure, *, n_layers: int, d_model: int) -> int:
    """The most numbers of a token that one feature reads."""
    match structure:
        case WeaklyCausal() | StrictlyCausal() | Transcoder():
            return d_model
        case LocalWindow(width=width):
            return width * d_model
        case _:
            return sum(layer_widths(structure, n_layers=n_layers, d_model=d_model))


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
