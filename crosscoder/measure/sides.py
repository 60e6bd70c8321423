"""One dictionary as a side of a comparison: its features on a text, in the order of their layers, and their spreads.

A feature has connections: its encoder row on every layer that it reads, its decoder row on every layer that it writes.
A norm is no evidence of use, so that what a feature reads is also measured on the tokens where it is active.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from crosscoder.data.sources import Marked
from crosscoder.dictionary import Dictionary, LayerwiseSAE, SparseCode
from crosscoder.measure import counting, matching, profile
from crosscoder.measure.profile import known_mean, participation_ratio
from crosscoder.measure.reading import Reading
from crosscoder.measure.rows import FeatureRows
from crosscoder.results.table import Place, Row, rows_at


@dataclass(frozen=True)
class Spreads:
    """Over how many layers each feature extends, `[F]` each, from 1 to L; 0 for one without any norm.

    norm_F: participation ratio of squared decoder norms, each layer at its scale. model_F: the same in the model's own
        units. connection_F: `norm_F` over the layers that the structure lets the feature write, from 1 / n to 1.
    read_F: participation ratio of squared encoder norms. use_F: of `E[<E_l, x_l - b_l>^2]`, the mean square over the
        tokens where the feature is active of what each layer adds to its pre-activation.
    """

    norm_F: np.ndarray
    model_F: np.ndarray
    connection_F: np.ndarray
    read_F: np.ndarray
    use_F: np.ndarray

    def only(self, kept_F: np.ndarray) -> Spreads:
        return Spreads(*(value_F[kept_F] for value_F in vars(self).values()))


class Uses:
    """Mean squares of what each layer adds to the pre-activations of active features, gathered batch by batch.

    `watch` of `read_dictionary`. A feature of a bank reads one layer, and nothing is gathered.
    """

    def __init__(self, dictionary: Dictionary) -> None:
        self.rows = FeatureRows.of(dictionary)
        self.joint = self.rows.layer_FK.shape[1] > 1
        self.square_FL = torch.zeros(self.rows.layer_FK.shape, dtype=torch.float64)

    @torch.no_grad()
    def __call__(self, batch: Marked, code: SparseCode) -> None:
        if not self.joint:
            return
        row_P = code.rows()
        active_P = (code.values > 0) & batch.kept_B[row_P]
        feature_p = code.features[active_P].long()
        for here, part_pL in self.rows.parts(batch.x_BLD, row_P[active_P], feature_p):
            self.square_FL.index_add_(0, feature_p[here].cpu(), part_pL.double().square().cpu())

    def shares(self) -> np.ndarray:
        """Of each layer, `[F, L]`; rows of zeros where nothing was gathered."""
        return profile.shares(self.square_FL.numpy())


@dataclass(frozen=True)
class Side:
    """A dictionary's alive features on a text, in the order of their strongest layers (by decoder norm, at scale).

    name: a short label. kind, sites: what it reads and writes, as its record says; sites count from 0 without one.
    scale_L: its `input_scale`.
    """

    name: str
    reading: Reading
    spreads: Spreads
    kind: str
    sites: tuple[int, ...]
    scale_L: np.ndarray

    @cached_property
    def strongest_F(self) -> np.ndarray:
        """The place of each feature's strongest layer among the sites, ascending."""
        return self.reading.profile_FL.argmax(1) if len(self.reading) else np.zeros(0, dtype=np.int64)

    def decoder(self, sites: Sequence[int], scale_L: np.ndarray) -> np.ndarray:
        """What features write at some sites, in the units of inputs at another scale, `[F, L, D]`."""
        places = [self.sites.index(site) for site in sites]
        ratio_L = np.asarray(scale_L) / self.scale_L[places]
        rows_FLD = self.reading.decoder_FLD
        if places != list(range(rows_FLD.shape[1])):
            rows_FLD = rows_FLD[:, places]
        return rows_FLD if np.allclose(ratio_L, 1, rtol=1e-5) else rows_FLD * ratio_L[:, None].astype(np.float32)


def make_side(
    name: str, dictionary: Dictionary, reading: Reading, uses: Uses, sites: tuple[int, ...] | None = None
) -> Side:
    """A side from a dictionary, its reading on a text, and what was gathered with it.

    sites: what it was read on, where it keeps no record; None: its layers count from 0.
    """
    config, reads, scale_L = dictionary.config, dictionary.reads, dictionary.input_scale.cpu().numpy()
    kept, n_layers = reading.index_F, config.n_layers
    if uses.joint:
        masks = config.masks()
        writable_F = np.full(len(kept), n_layers)
        if masks is not None:
            writable_F = masks.write.any(2).sum(1).numpy()[kept]
        read_F = participation_ratio(profile.layer_profile(uses.rows.encoder_FKD.float().cpu().numpy()))[kept]
        use_F = participation_ratio(uses.shares()[kept])
    else:
        writable_F, read_F, use_F = (np.ones(len(kept)) for _ in range(3))
    model_FLD = matching.layer_squares(reading.decoder_FLD) / np.square(scale_L, dtype=np.float64)
    spreads = Spreads(
        norm_F=reading.rho_F,
        model_F=participation_ratio(profile.shares(model_FLD)),
        connection_F=reading.rho_F / writable_F,
        read_F=read_F,
        use_F=use_F,
    )
    order_F = np.argsort(reading.profile_FL.argmax(1), kind="stable") if len(reading) else np.zeros(0, dtype=np.int64)
    kind, own = ("residual", sites or tuple(range(n_layers))) if reads is None else (reads.site, reads.sites)
    return Side(name, reading.only(order_F), spreads.only(order_F), kind, _distinct(own), scale_L)


def _distinct(sites: tuple[int, ...]) -> tuple[int, ...]:
    """Sites by which layers are told apart: of MLPs, whose inputs and outputs have one number, places follow on."""
    return sites if len(set(sites)) == len(sites) else tuple(range(len(sites)))


def describe_side(side: Side, dictionary: Dictionary) -> list[Row]:
    """What one dictionary is, counts and explains, and how its features spread, as rows."""
    reading = side.reading
    spread = {f"spread_{name.removesuffix('_F')}": known_mean(value) for name, value in vars(side.spreads).items()}
    return rows_at(
        Place(dictionary=side.name),
        {
            "dictionary_form": _form(dictionary),
            "dictionary_rule": str(dictionary.config.sparsity),
            "dictionary_reads": str(dictionary.reads or "no record of what it reads"),
            "dictionary_sites": list(side.sites),
            "tokens_held_out": reading.n_tokens,
            "explained_variance": reading.explained_variance,
            "l0_token": reading.l0,
            "l0_token_layer": reading.l0_layer,
            **counting.count_features(reading),
            **spread,
            "strongest_layers": np.bincount(side.strongest_F, minlength=len(side.sites)).tolist(),
        },
    )


def _form(dictionary: Dictionary) -> str:
    """What kind of dictionary it is, in words."""
    if isinstance(dictionary, LayerwiseSAE):
        return "one SAE for all layers" if dictionary.config.shared else "an SAE for each layer"
    structure = type(dictionary.config.structure).__name__
    words = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", structure).lower()
    return "crosscoder" if structure == "Acausal" else f"crosscoder, {words}"
