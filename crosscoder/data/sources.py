"""Sources of activations: batches to train on, by number, and held-out batches in the order of the text.

Unusual here: a source has no cursor. `batch(index, size, seed)` is a pure function, so the whole data state of a run is
the number of the next batch, and any batch can be asked for first. All layers of a token travel together.
"""

from __future__ import annotations

import abc
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from crosscoder.data.order import epoch_spans, seeded_generator
from crosscoder.data.residuals import OUTLIER_RATIO, norms_of, require_finite
from crosscoder.foundation.origin import Kind, Reads, require_same

SiteKind = Literal["residual", "write"]
EVALUATION_BATCH = 4096
WINDOW_TOKENS = 98_304
"""Tokens that batches mix. A small window holds few sequences: with 16,384 tokens a crosscoder on the writes of an
untrained model has .54 of its features dead, with this window .28, with all 120,010 .22 (`benchmarks/mixing.md`)."""


class Source(abc.ABC):
    """What dictionaries are trained and measured on."""

    n_layers: int
    d_model: int
    scale_L: Tensor
    """The factor of each layer by which raw activations were multiplied; a dictionary keeps it as `input_scale`."""

    @abc.abstractmethod
    def batch(self, index: int, size: int, seed: int) -> Tensor:
        """Scaled batch number `index` of `size` tokens less outliers, float32 `x_BLD`, in the order of `seed`."""

    def __repr__(self) -> str:
        sites = f", sites {', '.join(map(str, self.sites))}" if self.sites else ""
        return f"{type(self).__name__}({self.n_layers} layers x {self.d_model}{sites})"

    reads: Reads | None = None
    """What the activations are of; None where nothing is known, or nothing real was read."""
    sites: tuple[int, ...] = ()
    """The blocks that the layers are of, where they are one model's."""
    fingerprint: str = ""
    """Sources of one fingerprint give the same batches; empty where nobody keeps them apart."""

    @abc.abstractmethod
    def marked(self) -> Iterator[Marked]:
        """All scaled tokens that are never trained on, in order, outliers marked."""

    def marked_on(self, device: str | torch.device) -> Iterator[Marked]:
        """The same on a device."""
        return (Marked(*(tensor.to(device) for tensor in batch[:3]), batch.token_B) for batch in self.marked())

    def held_out(self) -> Iterator[Tensor]:
        """Scaled batches `x_BLD` of usual tokens that are never trained on."""
        return (batch.kept() for batch in self.marked())

    def batches(self, size: int, *, seed: int, steps: int) -> Batches:
        """What `train` takes: a function that gives the batches from a step on, up to `steps`."""
        return Batches(self, size, seed, steps)


@dataclass(frozen=True)
class Batches:
    """The training batches of a source, from a step on, up to `steps`, with the scale that they are at."""

    source: Source
    size: int
    seed: int
    steps: int

    def __call__(self, start: int) -> Iterator[Tensor]:
        return (self.source.batch(index, self.size, self.seed) for index in range(start, self.steps))

    @property
    def scale_L(self) -> Tensor:
        """The factor of each layer by which raw activations were multiplied."""
        return self.source.scale_L

    @property
    def reads(self) -> Reads | None:
        return self.source.reads


class Activations(abc.ABC):
    """The activations of a text at all harvested sites, read from a store or harvested when they are asked for.

    Tokens have a stored order, that of the text. Rows are float32 `[t, sites, D]`, not scaled.
    """

    n_tokens: int  # in one epoch
    sites: tuple[int, ...]
    fingerprint: str
    context: int  # tokens of a block, S
    keep_outliers: bool
    harvested: Reads | None
    """What is read, all sites as a residual stream or MLPs; None for a store that keeps no record."""
    token_T: Tensor
    """For each token its block's number in the text times S, and its position there, int64."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.n_tokens:,} tokens, sites {', '.join(map(str, self.sites))})"

    @property
    @abc.abstractmethod
    def d_model(self) -> int:
        """The width."""

    @property
    @abc.abstractmethod
    def document_T(self) -> Tensor:
        """The number of each token's document, int64."""

    @property
    def sequences_T(self) -> Tensor:
        return self.token_T // self.context

    @property
    def positions_T(self) -> Tensor:
        return self.token_T % self.context

    @abc.abstractmethod
    def rows(self, start: int, stop: int) -> Tensor:
        """Tokens `start` to `stop` in stored order."""

    @abc.abstractmethod
    def epoch_rows(self, start: int, stop: int, *, seed: int, epoch: int) -> Tensor:
        """Tokens `start` to `stop` of a shuffled epoch, see `EpochOrder`."""

    @abc.abstractmethod
    def epoch_numbers(self, start: int, stop: int, *, seed: int, epoch: int) -> Tensor:
        """Stored numbers of the tokens that `epoch_rows` gives."""

    @abc.abstractmethod
    def document_of(self, token: int) -> int:
        """A token's document."""

    @abc.abstractmethod
    def site_scale(self, kind: SiteKind) -> Tensor:
        """The factor of each layer of `select_sites(..., kind)` that makes its usual norm sqrt(D)."""

    def reads(self, kind: SiteKind, scale_L: Tensor) -> Reads | None:
        """The record of a dictionary of one kind of site, at these scales."""
        if self.harvested is None:
            return None
        sites, scale = select_site_numbers(self.sites, kind), tuple(scale_L.tolist())
        site: Kind = self.harvested.site if kind == "residual" else kind
        return replace(self.harvested, site=site, sites=sites, scale=scale)


class Marked(NamedTuple):
    """Scaled tokens `x_BLD`, at which layers each is an outlier `[B, L]`, whether it is kept `[B]`, and its number in
    the text (`Activations.token_T`)."""

    x_BLD: Tensor
    outlier_BL: Tensor
    kept_B: Tensor
    token_B: Tensor

    @classmethod
    def plain(cls, x_BLD: Tensor, token_B: Tensor) -> Marked:
        """Tokens among which no outlier is sought."""
        none_BL = torch.zeros(x_BLD.shape[:2], dtype=torch.bool, device=x_BLD.device)
        return cls(x_BLD, none_BL, ~none_BL.any(1), token_B)

    def kept(self) -> Tensor:
        """The tokens that are kept, `[b, L, D]`."""
        return chosen_tokens(self.x_BLD, self.kept_B)


def chosen_tokens(x_BLD: Tensor, chosen_B: Tensor) -> Tensor:
    """The tokens of a mask; the tensor itself where that is all of them."""
    return x_BLD if bool(chosen_B.all()) else x_BLD[chosen_B]


class SiteSource(Source):
    """Block outputs ("residual") or what each block added ("write"), both splits at the training split's scales.

    A token whose norm is more than ten times the usual one at any layer is left out of batches, which are then
    smaller, unless the activations were harvested to keep them: a handful of massive activations would decide every
    sum of squares. Two sources of one `fingerprint` (of the model, the text and their order) give the same batches.
    """

    def __init__(
        self, train: Activations, held_out: Activations | None, kind: SiteKind, *, scale_L: Tensor | None = None
    ) -> None:
        if held_out is not None:
            require_same(train.harvested, held_out.harvested, owner="the training split", given="the held-out split")
        self.train, self._held_out, self.kind = train, held_out, kind
        self.sites = select_site_numbers(train.sites, kind)
        self.n_layers, self.d_model = len(self.sites), train.d_model
        self.scale_L = train.site_scale(kind) if scale_L is None else scale_L.cpu()
        self.fingerprint = f"{train.fingerprint}/{kind}"

    @functools.cached_property
    def reads(self) -> Reads | None:
        return self.train.reads(self.kind, self.scale_L)

    def batch(self, index: int, size: int, seed: int) -> Tensor:
        x_BLD = self.whole_batch(index, size, seed)
        kept_B = self.kept(self._outliers(x_BLD, lambda: self._tokens(index, size, seed), self.train))
        if not bool(kept_B.any()):
            raise ValueError(
                f"all {len(x_BLD)} tokens of batch {index} are outliers, of more than {OUTLIER_RATIO:g} times the "
                "usual norm at some layer; take larger batches, or harvest with --keep-outliers"
            )
        return chosen_tokens(x_BLD, kept_B)

    def whole_batch(self, index: int, size: int, seed: int) -> Tensor:
        """Batch number `index` with its outliers, `x_BLD` of exactly `size` tokens."""
        spans = epoch_spans(self.train.n_tokens, batch=size, index=index)
        pieces = [self.train.epoch_rows(start, stop, seed=seed, epoch=epoch) for epoch, start, stop in spans]
        x_TLD = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
        return select_sites(x_TLD, self.train.sites, self.kind) * self.scale_L.to(x_TLD.device)[:, None]

    def _tokens(self, index: int, size: int, seed: int) -> Tensor:
        """Numbers in the text of the tokens of a batch."""
        spans = epoch_spans(self.train.n_tokens, batch=size, index=index)
        stored = [self.train.epoch_numbers(start, stop, seed=seed, epoch=epoch) for epoch, start, stop in spans]
        return self.train.token_T[torch.cat(stored)]

    def _outliers(self, x_BLD: Tensor, tokens: Callable[[], Tensor], of: Activations) -> Tensor:
        """Where tokens at this source's scale are outliers; a ValueError that names the first that is not finite.

        Raw ones, of a dictionary that was not trained here, say nothing of their usual norm: what their own scale would
        be is looked up.
        """
        require_finite(x_BLD, norm_BL := norms_of(x_BLD), tokens, of.document_of, self.sites, of.context)
        if bool((self.scale_L == 1).all()):
            norm_BL = norm_BL * self._usual_L.to(norm_BL.device)
        return norm_BL > OUTLIER_RATIO * x_BLD.shape[-1] ** 0.5

    @functools.cached_property
    def _usual_L(self) -> Tensor:
        return self.train.site_scale(self.kind)

    def kept(self, outlier_BL: Tensor) -> Tensor:
        """Which tokens are kept, bool `[B]`: those that are outliers at no layer, or all."""
        return torch.ones_like(outlier_BL[:, 0]) if self.train.keep_outliers else ~outlier_BL.any(1)

    def marked(self) -> Iterator[Marked]:
        return self._in_order(self.held_out_activations)

    def _in_order(self, activations: Activations) -> Iterator[Marked]:
        for start in range(0, activations.n_tokens, EVALUATION_BATCH):
            stop = min(start + EVALUATION_BATCH, activations.n_tokens)
            x_TLD = activations.rows(start, stop)
            x_BLD = select_sites(x_TLD, activations.sites, self.kind) * self.scale_L.to(x_TLD.device)[:, None]
            token_B = activations.token_T[start:stop]
            outlier_BL = self._outliers(x_BLD, lambda token_B=token_B: token_B, activations)
            yield Marked(x_BLD, outlier_BL, self.kept(outlier_BL), token_B)

    @property
    def held_out_activations(self) -> Activations:
        """The held-out split; a ValueError if the source was made without one."""
        if self._held_out is None:
            raise ValueError("this source has no held-out activations; give both splits")
        return self._held_out


class ShuffledSource(Source):
    """The null in which layers know nothing of each other: in each batch, every layer's tokens in an order of its own.

    Each layer keeps its vectors, and so its own statistics; only which vectors stand side by side as one token changes.
    Training batches are drawn from shuffled text, and a token of a layer meets others in each epoch, so that no pairing
    can be learnt by heart. Held-out batches follow the text: partners come from the same stretch of it, so batches must
    be much longer than documents, and what the topic of a stretch shows in several layers stays, which makes the null
    larger and X smaller.
    """

    def __init__(self, source: Source, seed: int) -> None:
        self._source, self._seed = source, seed
        self.n_layers, self.d_model, self.scale_L = source.n_layers, source.d_model, source.scale_L
        self.reads = None if source.reads is None else source.reads.as_null("shuffled")
        self.sites, self.fingerprint = source.sites, f"{source.fingerprint}/shuffled {seed}"

    def batch(self, index: int, size: int, seed: int) -> Tensor:
        return self._shuffle(self._source.batch(index, size, seed), "shuffled layers", self._seed, seed, index)

    def marked(self) -> Iterator[Marked]:
        for index, batch in enumerate(self._source.marked()):
            x_BLD = self._shuffle(batch.kept(), "shuffled stream", self._seed, index)
            yield Marked.plain(x_BLD, batch.token_B[batch.kept_B.cpu()])

    def _shuffle(self, x_BLD: Tensor, *stream: int | str) -> Tensor:
        n_tokens, generator, layers = len(x_BLD), seeded_generator(*stream), range(self.n_layers)
        order_BL = torch.stack([torch.randperm(n_tokens, generator=generator) for _ in layers], dim=1)
        return x_BLD[order_BL.to(x_BLD.device), torch.tensor(layers, device=x_BLD.device)]


class StackedSource(Source):
    """Several models on the same tokens, layers one after another; narrow ones are padded with zeros at the end.

    Each model is multiplied by a weight so that all have the same total energy, the mean over models of layers times
    width.
    """

    def __init__(self, sources: Sequence[SiteSource]) -> None:
        self.sources = tuple(sources)
        _check_same_tokens([source.train for source in sources])
        _check_same_tokens([source.held_out_activations for source in sources])
        self.context = sources[0].train.context
        self.layer_counts = tuple(source.n_layers for source in sources)
        self.widths = tuple(source.d_model for source in sources)
        self.n_layers, self.d_model = sum(self.layer_counts), max(self.widths)
        energies = [layers * width for layers, width in zip(self.layer_counts, self.widths, strict=True)]
        self.weights = [math.sqrt(sum(energies) / len(energies) / energy) for energy in energies]
        weighted = zip(sources, self.weights, strict=True)
        self.scale_L = torch.cat([source.scale_L * weight for source, weight in weighted])

    @property
    def energy_L(self) -> np.ndarray:
        """Mean square norm of each layer, by construction of the scales."""
        each = [weight**2 * width for weight, width in zip(self.weights, self.widths, strict=True)]
        return np.repeat(each, self.layer_counts)

    def batch(self, index: int, size: int, seed: int) -> Tensor:
        parts = [source.whole_batch(index, size, seed) for source in self.sources]
        kept = [source.kept(is_outlier(x_BLD)) for source, x_BLD in zip(self.sources, parts, strict=True)]
        return chosen_tokens(self._stack(parts), torch.stack(kept).all(0))

    def marked(self) -> Iterator[Marked]:
        for parts in zip(*(source.marked() for source in self.sources), strict=True):
            outlier_BL = torch.cat([part.outlier_BL for part in parts], dim=1)
            kept_B = torch.stack([part.kept_B for part in parts]).all(0)
            yield Marked(self._stack([part.x_BLD for part in parts]), outlier_BL, kept_B, parts[0].token_B)

    def _stack(self, parts: Sequence[Tensor]) -> Tensor:
        weighted = [x_BLD * weight for x_BLD, weight in zip(parts, self.weights, strict=True)]
        return torch.cat([F.pad(x_BLD, (0, self.d_model - x_BLD.shape[2])) for x_BLD in weighted], dim=1)


def is_outlier(x_BLD: Tensor) -> Tensor:
    """Where scaled tokens have more than ten times the usual norm sqrt(D), bool `[B, L]`."""
    return norms_of(x_BLD) > OUTLIER_RATIO * x_BLD.shape[-1] ** 0.5


def are_neighbours(sites: tuple[int, ...]) -> bool:
    """Whether `sites` are two or more blocks in a row, so that their differences are the blocks' writes."""
    return len(sites) > 1 and sites == tuple(range(sites[0], sites[-1] + 1))


def select_site_numbers(sites: tuple[int, ...], kind: SiteKind) -> tuple[int, ...]:
    """Which blocks a source of harvested `sites` shows."""
    if kind not in get_args(SiteKind):
        raise ValueError(f"kind is {kind!r}, expected 'residual' or 'write'")
    if kind == "write" and not are_neighbours(sites):
        raise ValueError(
            f"sites {list(sites)} are not two or more neighbours, so blocks' writes are not their "
            "differences; harvest every layer"
        )
    chosen = sites[1:] if kind == "write" or sites[0] == 0 else sites
    if not chosen:
        raise ValueError(f"sites {list(sites)} hold no block output; harvest more layers")
    return chosen


def select_sites(x_TLD: Tensor, sites: tuple[int, ...], kind: SiteKind) -> Tensor:
    """`x_TLD` without the embedding ("residual"), or the differences of neighbouring sites ("write")."""
    chosen = select_site_numbers(sites, kind)
    return x_TLD.diff(dim=1) if kind == "write" else x_TLD[:, -len(chosen) :]


def _check_same_tokens(splits: Sequence[Activations]) -> None:
    first = splits[0]
    for other in splits[1:]:
        if not all(torch.equal(getattr(first, name), getattr(other, name)) for name in ("sequences_T", "positions_T")):
            raise ValueError(
                f"one source holds {first.n_tokens:,} tokens, the other {other.n_tokens:,}, or others; stacked models "
                "must be read on the same tokens in the same order"
            )
