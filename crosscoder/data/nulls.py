"""Nulls: what stands in the place of a model's activations, to see what is found where there is nothing to find.

`ShuffledSource` keeps each layer and takes from it what it shares with others; `GaussianSource` keeps mean and
covariance of all layers together, and has no features. Their records and fingerprints say so (`Reads.null`), and what
was trained on one is not measured on the other, or on the model.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from crosscoder.data.order import seeded_generator
from crosscoder.data.sources import EVALUATION_BATCH, Marked, ShuffledSource, SiteSource, Source
from crosscoder.foundation.console import Progress, human_bytes
from crosscoder.foundation.origin import Null
from crosscoder.foundation.signals import safe_points

NULL_SEED = 1
"""Of the nulls that commands make."""
MOST_JOINT = 8192
"""The most numbers of a token over all layers, L * D. A root takes 40 s at 3,000 on two cores, by the cube more."""
ROOT_BYTES = 44
"""A number of the covariance, while its root is taken: as measured, five float64 and one float32."""


class Moments(NamedTuple):
    """Mean `[N]` and covariance `[N, N]` of tokens over all layers together, N = L * D, float64."""

    mean_N: Tensor
    covariance_NN: Tensor


class GaussianSource(Source):
    """The null without features: tokens drawn from a Gaussian of a source's mean and covariance, all layers together.

    What a measurement finds here follows from second moments alone: PCA finds the same. Mean and covariance are those
    of `n_tokens` training tokens, in float64, one pass over them before the first batch. Tokens are that mean plus
    standard normal numbers times the symmetric square root of the covariance, which is unique and needs no inverse, so
    that directions without variance stay without: there may be fewer tokens than L * D. Every batch is a function of
    its number, size and seed; held-out tokens are draws of their own, and as usual as all others: none is an outlier.

    n_tokens: in batches of the source, each once where they are an epoch.
    held_out_tokens: how many there are; the last batch may be smaller than the others.
    quiet: whether nothing is said of how that pass goes.
    """

    def __init__(self, source: Source, seed: int, *, n_tokens: int, held_out_tokens: int, quiet: bool = True) -> None:
        self._quiet = quiet
        covariance_bytes(source.n_layers, source.d_model)
        for name, value, least in (("n_tokens", n_tokens, 2), ("held_out_tokens", held_out_tokens, 1)):
            if value < least:
                raise ValueError(f"{name} is {value}, expected at least {least}")
        self._source, self._seed, self._n_tokens, self.held_out_tokens = source, seed, n_tokens, held_out_tokens
        self.n_layers, self.d_model, self.scale_L = source.n_layers, source.d_model, source.scale_L
        self.reads = None if source.reads is None else source.reads.as_null("gaussian")
        self.sites, self.fingerprint = source.sites, f"{source.fingerprint}/gaussian {seed} of {n_tokens}"

    def batch(self, index: int, size: int, seed: int) -> Tensor:
        return self._draw(size, "train", seed, index)

    def marked(self) -> Iterator[Marked]:
        for index, start in enumerate(range(0, self.held_out_tokens, EVALUATION_BATCH)):
            x_BLD = self._draw(min(EVALUATION_BATCH, self.held_out_tokens - start), "held out", index)
            yield Marked.plain(x_BLD, torch.arange(start, start + len(x_BLD)))

    @functools.cached_property
    def moments(self) -> Moments:
        """Of the source's training tokens."""
        n_batches = -(-self._n_tokens // EVALUATION_BATCH)
        size = self._n_tokens // n_batches  # so that no token comes twice: fewer than `n_batches` are left out
        batches = (self._source.batch(index, size, self._seed) for index in range(n_batches))
        with Progress("mean and covariance", self._n_tokens, unit="token", quiet=self._quiet) as progress:
            return estimate_moments(batches, progress)

    @functools.cached_property
    def _root_NN(self) -> Tensor:
        return symmetric_root(self.moments.covariance_NN).float()

    def _draw(self, n_tokens: int, *stream: int | str) -> Tensor:
        generator, root_NN = seeded_generator("gaussian", self._seed, *stream), self._root_NN
        noise_BN = torch.randn(n_tokens, len(root_NN), generator=generator, dtype=torch.float32)
        x_BN = torch.addmm(self.moments.mean_N.float(), noise_BN.to(root_NN.device), root_NN)
        return x_BN.view(n_tokens, self.n_layers, self.d_model)


def estimate_moments(batches: Iterable[Tensor], progress: Progress | None = None) -> Moments:
    """Mean and covariance (divided by tokens less 1) of batches `x_BLD`, in one pass.

    Sums are taken about the first batch's mean: squares of numbers far from zero would lose what differs.
    """
    n_tokens, about_N, sum_N, square_NN = 0, None, torch.zeros(()), torch.zeros(())
    for x_BLD in safe_points(batches):
        x_BN = x_BLD.flatten(1).double()
        if about_N is None:
            about_N = x_BN.mean(0)
            sum_N, square_NN = torch.zeros_like(about_N), about_N.new_zeros(len(about_N), len(about_N))
        x_BN = x_BN - about_N
        n_tokens += len(x_BN)
        sum_N += x_BN.sum(0)
        square_NN.addmm_(x_BN.T, x_BN)
        if progress is not None:
            progress.advance(len(x_BN))
    if about_N is None or n_tokens < 2:
        raise ValueError(f"a covariance needs at least two tokens, got {n_tokens}")
    square_NN.addr_(sum_N, sum_N, alpha=-1 / n_tokens).div_(n_tokens - 1)
    return Moments(about_N + sum_N / n_tokens, square_NN)


def symmetric_root(covariance_NN: Tensor) -> Tensor:
    """The symmetric square root of a covariance, which may have any rank.

    Eigenvalues within rounding of 0 (below N times the float's precision times the largest) are 0: their roots would
    be 1e-8 of the largest instead.
    """
    value_N, vector_NN = torch.linalg.eigh(covariance_NN)
    value_N[value_N < len(value_N) * torch.finfo(value_N.dtype).eps * value_N[-1]] = 0
    return (vector_NN * value_N.sqrt()) @ vector_NN.T


def covariance_bytes(n_layers: int, d_model: int) -> int:
    """What the covariance of all layers together takes at most, while its root is taken."""
    n_joint = n_layers * d_model
    if n_joint > MOST_JOINT:
        raise ValueError(
            f"{n_layers} layers of width {d_model} have a joint covariance of {n_joint:,} squared, "
            f"{human_bytes(ROOT_BYTES * n_joint**2)} while its root is taken; at most {MOST_JOINT:,} are taken: read "
            f"{MOST_JOINT // d_model} layers or fewer (--layers)"
        )
    return ROOT_BYTES * n_joint**2


def make_null(null: Null | None, source: SiteSource, *, quiet: bool = True) -> Source:
    """The null of a model's activations by its name, of all training tokens and as many held out; None: themselves."""
    if null is None:
        return source
    if source.reads is None:
        raise ValueError(
            f"a {null} null of activations that keep no record could be taken for the model's own; harvest them again"
        )
    if null == "shuffled":
        return ShuffledSource(source, NULL_SEED)
    held_out = source.held_out_activations.n_tokens
    n_tokens = source.train.n_tokens
    return GaussianSource(source, NULL_SEED, n_tokens=n_tokens, held_out_tokens=held_out, quiet=quiet)
