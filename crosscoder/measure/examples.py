"""What single features do on a text, in one pass and bounded memory: how often, how strongly, and where, in context.

Rates, moments and histograms are exact over all tokens that are read, which are those that a dictionary is made to
read (`Source.marked`): no first positions, special tokens or outliers. Examples are kept as the text streams by: the
strongest, at most one of a block, and a uniform sample of all tokens on which a feature is active. Neither depends on
how the text is cut into batches.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

from crosscoder.data.sources import Marked
from crosscoder.dictionary import Dictionary
from crosscoder.foundation.config import config
from crosscoder.foundation.console import Progress
from crosscoder.measure.reading import minimum_probability, sparse_rows
from crosscoder.measure.rows import FeatureRows

BINS_OF_OCTAVE = 2
FIRST_OCTAVE, LAST_OCTAVE = -20, 12
"""Activations of a histogram are from 2^-20 to 2^12; what is outside is counted in the first and the last bin."""
N_BINS = BINS_OF_OCTAVE * (LAST_OCTAVE - FIRST_OCTAVE)
N_LAYERED = 3
"""Strongest examples of which every layer's part is kept at every token."""
SAMPLE_BYTES = 2**28
"""Of the tokens that are kept to see how well single layers tell a feature (`measure.layer_reading`)."""


@config
class Wanted:
    """How much is kept of each feature.

    strongest: examples of it. sampled: tokens, drawn evenly from all on which it is active. before, after: tokens of an
    example around its own. seed: of the draw.
    """

    strongest: int = 12
    sampled: int = 32
    before: int = 16
    after: int = 7
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("strongest", "sampled", "before", "after"):
            if not 0 <= (value := getattr(self, name)) <= 1000:
                raise ValueError(f"{name} is {value}, expected 0 to 1000")

    @property
    def width(self) -> int:
        """Tokens of an example."""
        return self.before + 1 + self.after


class Sample(NamedTuple):
    """Some tokens, evenly spread over the text: `x_NLD` in the dictionary's scale, and their code `[N, F]`."""

    x_NLD: Tensor
    code: sparse.csr_array


@dataclass
class Activity:
    """What F features did on T tokens. A bank's features are numbered `layer * F + feature`.

    fired_F: tokens on which each is active. sum_F, largest_F: of its activations. bins_FH: how often they were in each
    bin, from `2 ** FIRST_OCTAVE` on, two to an octave.
    in_blocks_F: tokens read of the blocks in which it is active at all.
    parts_FK: of each row's `<encoder_l, x_l - center_l>`, the sum over tokens on which it is active.
    strongest, sampled: examples, of which `more["window"]` `[F, k, width]` is the feature's activation at each token
    around, 0 where it is not active and nan where the dictionary does not read. layered: the first of the strongest,
    of which `more["parts"]` `[F, k, width, K]` is each row's part, nan likewise. Of sampled ones `more["reading"]`
    `[F, k, K + 1]` is `FeatureRows.readings`.
    """

    rows: FeatureRows
    context: int
    wanted: Wanted
    n_tokens: int = 0
    n_blocks: int = 0
    fired_F: np.ndarray = field(init=False)
    sum_F: np.ndarray = field(init=False)
    largest_F: np.ndarray = field(init=False)
    bins_FH: np.ndarray = field(init=False)
    in_blocks_F: np.ndarray = field(init=False)
    parts_FK: np.ndarray = field(init=False)
    sample: Sample | None = None

    def __post_init__(self) -> None:
        n, rows, width = len(self.rows), self.rows.layer_FK.shape[1], self.wanted.width
        self.fired_F, self.in_blocks_F = (np.zeros(n, dtype=np.int64) for _ in range(2))
        self.sum_F = np.zeros(n)
        self.largest_F, self.bins_FH = np.zeros(n, dtype=np.float32), np.zeros((n, N_BINS), dtype=np.int64)
        self.parts_FK = np.zeros((n, rows))
        self.strongest = Kept(n, self.wanted.strongest, window=(width,))
        self.layered = Kept(n, min(N_LAYERED, self.wanted.strongest), parts=(width, rows))
        self.sampled = Kept(n, self.wanted.sampled, window=(width,), reading=(rows + 1,))

    @property
    def rate_F(self) -> np.ndarray:
        """Share of the tokens on which each is active."""
        return self.fired_F / max(1, self.n_tokens)

    @property
    def alive_F(self) -> np.ndarray:
        """Whether each is alive, as `measure.reading` says."""
        return self.rate_F > minimum_probability(max(1, self.n_tokens))

    @property
    def density_F(self) -> np.ndarray:
        """Share of the tokens on which it is active, of the blocks in which it is active at all; nan if in none."""
        known = self.in_blocks_F > 0
        return np.divide(self.fired_F, self.in_blocks_F, out=np.full(len(known), np.nan), where=known)

    @property
    def use_FL(self) -> np.ndarray:
        """Layer profile by use: what each layer adds to the pre-activation, the mean over tokens on which the feature
        is active, over the sum of all layers' magnitudes; from -1 to 1, negative where a layer speaks against it."""
        total_F1 = np.abs(self.parts_FK).sum(1, keepdims=True)
        share_FK = np.divide(self.parts_FK, total_F1, out=np.zeros_like(self.parts_FK), where=total_F1 > 0)
        return self.rows.on_layers(torch.from_numpy(share_FK)).numpy()


@torch.no_grad()
def read_features(
    dictionary: Dictionary,
    batches: Iterable[Marked],
    *,
    context: int,
    n_tokens: int,
    wanted: Wanted | None = None,
    quiet: bool = False,
) -> Activity:
    """What every feature of a dictionary does on the tokens of `batches`, in one pass, in evaluation mode.

    batches: in the order of the text, in the dictionary's scale (`Source.marked`). context: tokens of a block, S.
    n_tokens: how many there are in all, those that are not read included.
    """
    was_training = dictionary.training
    dictionary.eval()
    rows = FeatureRows.of(dictionary)
    activity, samples = Activity(rows, context, wanted or Wanted()), []
    token_bytes = 4 * rows.center_LD.numel()
    stride = max(1, math.ceil(n_tokens * token_bytes / SAMPLE_BYTES))
    with Progress("features", n_tokens, unit="token", quiet=quiet) as progress:
        for batch in whole_blocks(batches, context):
            progress.advance(len(batch.kept_B))
            if not bool(batch.kept_B.any()):
                continue
            piece = _Piece.of(dictionary, batch, context)
            _add(activity, piece)
            chosen = slice(-activity.n_tokens % stride, None, stride)
            samples.append(Sample(piece.x_BLD[chosen].cpu(), piece.code[chosen]))
            activity.n_tokens += len(piece.token_B)
    dictionary.train(was_training)
    if activity.n_tokens == 0:
        raise ValueError("no token is read: all are special tokens, outliers or at first positions; give more text")
    x, codes = zip(*samples, strict=True)
    activity.sample = Sample(torch.cat(x), sparse.csr_array(sparse.vstack(codes, format="csr")))
    return activity


def whole_blocks(batches: Iterable[Marked], context: int) -> Iterator[Marked]:
    """The tokens of batches in their order, those of a block always in one batch."""
    held: Marked | None = None
    for batch in batches:
        if held is not None:
            batch = Marked(*(torch.cat(both) for both in zip(held, batch, strict=True)))
        block_B = batch.token_B // context
        n_whole = int((block_B < block_B[-1]).sum())
        held = Marked(*(one[n_whole:] for one in batch))
        if n_whole:
            yield Marked(*(one[:n_whole] for one in batch))
    if held is not None:
        yield held


class _Piece(NamedTuple):
    """Tokens that are read, of whole blocks; their code, with features in order, and its P pairs."""

    x_BLD: Tensor
    token_B: np.ndarray
    code: sparse.csr_array
    row_P: np.ndarray
    context: int

    @classmethod
    def of(cls, dictionary: Dictionary, batch: Marked, context: int) -> _Piece:
        x_BLD, token_B = batch.kept(), batch.token_B[batch.kept_B.cpu()].numpy()
        code = dictionary.encode(x_BLD)
        n_groups = math.prod(code.batch_shape[1:])
        found = sparse_rows(code, len(token_B), n_groups, dictionary.config.n_features)
        found.sort_indices()
        return cls(x_BLD, token_B, found, np.repeat(np.arange(len(token_B)), np.diff(found.indptr)), context)

    def window_rows(self, row_p: np.ndarray, wanted: Wanted) -> np.ndarray:
        """The rows of the tokens around those of rows `row_p`, -1 where there is none in the block or it is not read,
        `[p, width]`."""
        token_p = self.token_B[row_p]
        around_pW = token_p[:, None] + np.arange(-wanted.before, wanted.after + 1)
        at = np.searchsorted(self.token_B, around_pW).clip(max=len(self.token_B) - 1)
        same = (self.token_B[at] == around_pW) & (around_pW // self.context == token_p[:, None] // self.context)
        return np.where(same, at, -1)

    def values(self, row_pW: np.ndarray, feature_p: np.ndarray) -> np.ndarray:
        """Activations of features at rows, 0 where they are not active, nan at row -1."""
        n_features = self.code.shape[1]
        key_P = self.row_P * n_features + self.code.indices
        key_pW = row_pW * n_features + feature_p[:, None]
        at = np.searchsorted(key_P, key_pW).clip(max=max(0, len(key_P) - 1))
        return np.where(row_pW < 0, np.nan, np.where(key_P[at] == key_pW, self.code.data[at], 0)).astype(np.float32)


def _add(activity: Activity, piece: _Piece) -> None:
    """Count the pairs of a piece, and keep what is to be kept of them."""
    feature_P, value_P, row_P = piece.code.indices.astype(np.int64), piece.code.data, piece.row_P
    token_P, n = piece.token_B[row_P], len(activity.fired_F)
    activity.fired_F += np.bincount(feature_P, minlength=n)
    activity.sum_F += np.bincount(feature_P, value_P, minlength=n)
    np.maximum.at(activity.largest_F, feature_P, value_P)
    np.add.at(activity.bins_FH, (feature_P, bin_of(value_P)), 1)
    _count_blocks(activity, piece, feature_P, token_P)
    rows, device = activity.rows, piece.x_BLD.device
    row_T, feature_T = (torch.from_numpy(one).to(device) for one in (row_P, feature_P))
    for here, part_pK in rows.parts(piece.x_BLD, row_T, feature_T):
        torch.from_numpy(activity.parts_FK).index_add_(0, feature_T[here].cpu(), part_pK.double().cpu())

    def window(kept_p: np.ndarray) -> np.ndarray:
        return piece.values(piece.window_rows(row_P[kept_p], activity.wanted), feature_P[kept_p])

    def parts(kept_p: np.ndarray) -> np.ndarray:
        row_pW = piece.window_rows(row_P[kept_p], activity.wanted)
        there = np.argwhere(row_pW >= 0)
        out_pWK = np.full((*row_pW.shape, activity.parts_FK.shape[1]), np.nan, dtype=np.float32)
        at_row, of = (torch.from_numpy(a).to(device) for a in (row_pW[*there.T], feature_P[kept_p][there[:, 0]]))
        for here, part_pK in rows.parts(piece.x_BLD, at_row, of):
            out_pWK[*there[here].T] = part_pK.cpu().numpy()
        return out_pWK

    def reading(kept_p: np.ndarray) -> np.ndarray:
        of = [torch.from_numpy(one[kept_p]).to(device) for one in (row_P, feature_P)]
        return np.concatenate([part.cpu().numpy() for _, part in rows.readings(piece.x_BLD, *of)])

    order = np.lexsort((token_P, -value_P, token_P // activity.context, feature_P))
    top = order[first_of_each(feature_P[order], token_P[order] // activity.context)]
    columns = feature_P[top], value_P[top].astype(np.float64), token_P[top], value_P[top]
    activity.strongest.add(*columns, lambda p: {"window": window(top[p])})
    activity.layered.add(*columns, lambda p: {"parts": parts(top[p])})
    drawn_P = hashed(token_P, feature_P, activity.wanted.seed)
    activity.sampled.add(feature_P, drawn_P, token_P, value_P, lambda p: {"window": window(p), "reading": reading(p)})


def _count_blocks(activity: Activity, piece: _Piece, feature_P: np.ndarray, token_P: np.ndarray) -> None:
    blocks, block_B, read = np.unique(piece.token_B // piece.context, return_inverse=True, return_counts=True)
    pairs = np.unique(feature_P * len(blocks) + block_B[piece.row_P])
    feature_p, block_p = np.divmod(pairs, len(blocks))
    activity.n_blocks += len(blocks)
    activity.in_blocks_F += np.bincount(feature_p, read[block_p], minlength=len(activity.fired_F)).astype(np.int64)


def bin_of(value_P: np.ndarray) -> np.ndarray:
    bins = np.floor(BINS_OF_OCTAVE * (np.log2(np.maximum(value_P, 1e-30)) - FIRST_OCTAVE)).astype(np.int64)
    return bins.clip(0, N_BINS - 1)


def quantile_examples(kept: Kept, feature: int) -> list[np.ndarray]:
    """Which of a feature's sampled tokens stand for each quarter by its activation, from the weakest to the strongest,
    three of them or fewer, evenly spaced by rank; places in `kept.value_Fk[feature]`."""
    order = np.argsort(kept.value_Fk[feature, : int(kept.is_there_Fk[feature].sum())], kind="stable")
    chosen = []
    for band in np.array_split(order, 4):
        at = np.linspace(0, len(band) - 1, min(3, len(band))).round().astype(int) if len(band) else []
        chosen.append(band[np.unique(at).astype(int)][::-1])
    return chosen


More = Callable[[np.ndarray], Mapping[str, np.ndarray]]
"""What else is kept of entries, given which of those that are added they are."""


class Kept:
    """The entries of each feature with the largest keys, the largest first; of equal keys the earliest token.

    What is kept depends on the entries alone, not on how they were split into calls. `key_Fk` is -inf and `token_Fk` -1
    where there are fewer than `size`. `more` holds further arrays `[F, k, *shape]`, of the shapes that are given.
    """

    def __init__(self, n_features: int, size: int, **shapes: tuple[int, ...]) -> None:
        self.size = size
        self.key_Fk = np.full((n_features, size), -np.inf)
        self.token_Fk = np.full((n_features, size), -1, dtype=np.int64)
        self.value_Fk = np.zeros((n_features, size), dtype=np.float32)
        self.more = {name: np.zeros((n_features, size, *shape), np.float32) for name, shape in shapes.items()}

    def add(
        self, feature_P: np.ndarray, key_P: np.ndarray, token_P: np.ndarray, value_P: np.ndarray, more: More
    ) -> None:
        """Entries of tokens later than any before; `more` is asked only for those that are kept."""
        chosen_p = np.flatnonzero(key_P > self.key_Fk[feature_P, -1]) if self.size else np.zeros(0, dtype=np.int64)
        chosen_p = chosen_p[np.lexsort((token_P[chosen_p], -key_P[chosen_p], feature_P[chosen_p]))]
        rank_p = _rank(feature_P[chosen_p])
        chosen_p, rank_p = chosen_p[rank_p < self.size], rank_p[rank_p < self.size]
        if not len(chosen_p):
            return
        touched, row_p = np.unique(feature_P[chosen_p], return_inverse=True)
        new = _padded(key_P[chosen_p], row_p, rank_p, (len(touched), self.size), -np.inf)
        order = np.argsort(-np.concatenate([self.key_Fk[touched], new], axis=1), axis=1, kind="stable")[:, : self.size]
        stays_p = (order[row_p] == self.size + rank_p[:, None]).any(1)
        chosen_p, row_p, rank_p = chosen_p[stays_p], row_p[stays_p], rank_p[stays_p]
        columns = {"key_Fk": key_P[chosen_p], "token_Fk": token_P[chosen_p], "value_Fk": value_P[chosen_p]}
        for held, values_p in (
            *((getattr(self, name), values) for name, values in columns.items()),
            *((self.more[name], values) for name, values in more(chosen_p).items()),
        ):
            fill = -np.inf if held is self.key_Fk else -1 if held is self.token_Fk else 0
            both = np.concatenate(
                [held[touched], _padded(values_p, row_p, rank_p, (len(touched), self.size), fill)], axis=1
            )
            held[touched] = np.take_along_axis(both, order.reshape(*order.shape, *[1] * (held.ndim - 2)), axis=1)

    @property
    def is_there_Fk(self) -> np.ndarray:
        return self.token_Fk >= 0


def _padded(
    values_p: np.ndarray, row_p: np.ndarray, rank_p: np.ndarray, shape: tuple[int, int], fill: float
) -> np.ndarray:
    out = np.full((*shape, *values_p.shape[1:]), fill, dtype=values_p.dtype)
    out[row_p, rank_p] = values_p
    return out


def _rank(sorted_P: np.ndarray) -> np.ndarray:
    """The place of each entry among those of its number, in an array where equal numbers stand together."""
    begins = first_of_each(sorted_P)
    starts = np.flatnonzero(begins)
    return np.arange(len(sorted_P)) - starts[begins.cumsum() - 1]


def first_of_each(*numbers: np.ndarray) -> np.ndarray:
    """Where each new combination of sorted numbers begins, as a mask."""
    differs = np.zeros(max(0, len(numbers[0]) - 1), dtype=bool)
    for one in numbers:
        differs |= one[1:] != one[:-1]
    return np.r_[np.ones(min(1, len(numbers[0])), dtype=bool), differs]


def hashed(token_P: np.ndarray, feature_P: np.ndarray, seed: int) -> np.ndarray:
    """A number in [0, 1) for each token and feature, as random as SplitMix64 (Steele et al. 2014), the same in any run.

    The entries with the largest are a uniform sample without replacement, however the text is read.
    """
    with np.errstate(over="ignore"):
        mixed = token_P.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        mixed ^= feature_P.astype(np.uint64) * np.uint64(0xD1B54A32D192ED03) + np.uint64(seed)
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
            mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    return (mixed >> np.uint64(11)).astype(np.float64) / 2.0**53
