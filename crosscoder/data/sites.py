"""Some sites of harvested activations, so that dictionaries of other layers are read on the same tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from crosscoder.data.residuals import combine_fingerprints
from crosscoder.data.sources import Activations, SiteKind
from crosscoder.foundation.origin import MismatchError, Reads


class ChosenSites(Activations):
    """A view of some sites of a text's activations, in the order in which they were harvested."""

    def __init__(self, activations: Activations, places: Sequence[int]) -> None:
        self._all, self._places = activations, list(places)
        self.sites = tuple(activations.sites[place] for place in places)
        self.n_tokens, self.context, self.token_T = activations.n_tokens, activations.context, activations.token_T
        self.keep_outliers = activations.keep_outliers
        whole = activations.harvested
        self.harvested = None if whole is None else replace(whole, sites=self.sites)
        self.fingerprint = combine_fingerprints(activations.fingerprint, f"sites {self.sites}")

    @property
    def d_model(self) -> int:
        return self._all.d_model

    @property
    def document_T(self) -> Tensor:
        return self._all.document_T

    def rows(self, start: int, stop: int) -> Tensor:
        return self._all.rows(start, stop)[:, self._places]

    def epoch_rows(self, start: int, stop: int, *, seed: int, epoch: int) -> Tensor:
        return self._all.epoch_rows(start, stop, seed=seed, epoch=epoch)[:, self._places]

    def epoch_numbers(self, start: int, stop: int, *, seed: int, epoch: int) -> Tensor:
        return self._all.epoch_numbers(start, stop, seed=seed, epoch=epoch)

    def document_of(self, token: int) -> int:
        return self._all.document_of(token)

    def site_scale(self, kind: SiteKind) -> Tensor:
        chosen = self.sites[1:] if kind == "write" else self.sites
        of_all = self._all.sites[len(self._all.sites) - len(scale_L := self._all.site_scale(kind)) :]
        return torch.stack([scale_L[of_all.index(site)] for site in chosen])


def choose_sites(activations: Activations, reads: Reads | None, *, owner: str) -> tuple[Activations, SiteKind]:
    """The activations at the sites that a dictionary reads, and as what it reads them.

    reads: the dictionary's record; one that keeps none gets all sites, as a residual stream.
    """
    if reads is None or reads.site == "mlp":
        return activations, "residual"
    kind, wanted = kind_read(reads), needed_sites(reads)
    if missing := sorted(set(wanted) - set(activations.sites)):
        raise MismatchError(
            f"{owner} reads {'writes of blocks' if kind == 'write' else 'sites'} {list(reads.sites)}, and of sites "
            f"{list(activations.sites)} that were harvested {missing} are not among them; harvest them too (--layers)"
        )
    if wanted == activations.sites:
        return activations, kind
    return ChosenSites(activations, [activations.sites.index(site) for site in wanted]), kind


def kind_read(reads: Reads | None) -> SiteKind:
    """What a dictionary reads of each block; a residual stream, if it does not say."""
    return "write" if reads is not None and reads.site == "write" else "residual"


def needed_sites(reads: Reads) -> tuple[int, ...]:
    """The sites that are harvested for a dictionary; what blocks write are differences, and need one more."""
    return tuple(range(reads.sites[0] - 1, reads.sites[-1] + 1)) if reads.site == "write" else reads.sites
