"""Two dictionaries of one model and text, feature by feature: which features of one are found in the other, and where.

Features are compared by activity on the same tokens, and where both dictionaries write the same layers by what they
write there. Both are beside a null: activity shifted past the longest document, and decoder rows shifted along the
width, so that each feature keeps its rate, its runs and the sizes of its entries, and only belonging together is gone.
Similarities are worked out in blocks of rows; pairs are mutual nearest neighbours, which needs no assignment.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import sparse

from crosscoder.foundation.console import Progress
from crosscoder.measure import counting, matching, rates
from crosscoder.measure.counting import LINK
from crosscoder.measure.matching import Nearest, Similarity
from crosscoder.measure.profile import known_mean
from crosscoder.measure.reading import Reading, common_tokens
from crosscoder.measure.sides import Side
from crosscoder.measure.statistics import statistic_row
from crosscoder.measure.universality import circular_shifts, shift_tokens
from crosscoder.results.table import Estimate, Place, Row, Value, rows_at

NULL_DRAWS = 20  # shifts
NULL_FEATURES = 2048
"""Features of each side that are matched under every shift: all, or so many evenly drawn over firing rates."""
TENTHS = 10  # groups of features by firing rate, each with a null of its own: rates decide what chance gives
NO_LAYER = "the two write no layer in common"
NOT_ASKED = "no null was asked for"
BEYOND = 0.95  # share of its tenth's null that a feature's best match exceeds


class NearestByLayer(Nearest):
    """`Nearest` that also keeps each feature's best among those of every layer of the other side.

    layer_a, layer_b: the layer of each feature, ascending. `layers_aL` `[Fa, Lb]` and `layers_bL` `[Fb, La]` are the
    best similarities; -inf where a layer has no feature.
    """

    def __init__(self, layer_a: np.ndarray, layer_b: np.ndarray, n_a: int, n_b: int) -> None:
        super().__init__(len(layer_b))
        self._layer_a, (self._there, self._starts) = layer_a, np.unique(layer_b, return_index=True)
        self.layers_aL = np.full((len(layer_a), n_b), -np.inf, dtype=np.float32)
        self.layers_bL = np.full((len(layer_b), n_a), -np.inf, dtype=np.float32)

    def add(self, start: int, block: np.ndarray) -> None:
        super().add(start, block)
        self.layers_aL[start : start + len(block), self._there] = np.maximum.reduceat(block, self._starts, axis=1)
        here, starts = np.unique(self._layer_a[start : start + len(block)], return_index=True)
        top = np.maximum.reduceat(block, starts, axis=0).T
        self.layers_bL[:, here] = np.maximum(self.layers_bL[:, here], top)


@dataclass(frozen=True)
class Null:
    """What some features of one side find in the other by chance, in each of R draws.

    mean: their best similarity, over features and draws. found: the share whose best is .7 or more, with its range over
    draws; matched: the share that is matched one to one, or why it is not known. by_tenth: best similarities of the
    features of each tenth by firing rate, over all draws, ascending.
    """

    mean: float
    found: Estimate
    matched: Estimate | str
    by_tenth: tuple[np.ndarray, ...]

    @classmethod
    def of(cls, draws: list[Nearest], tenth_S: np.ndarray, *, whole: bool) -> Null:
        """From the nearest features of a sample in each draw; `whole`: of all features, so that pairs can be told."""
        best_RS, matched = np.stack([one.best_a for one in draws]), "measured where a side has 2,048 features or fewer"
        if whole:
            matched = Estimate.over([len(one.mutual_pairs(LINK)) / len(tenth_S) for one in draws])
        by_tenth = tuple(np.sort(best_RS[:, tenth_S == tenth].ravel()) for tenth in range(TENTHS))
        found = Estimate.over((best_RS >= LINK).mean(1).tolist())
        return cls(float(best_RS.mean()), found, matched, by_tenth)

    def percentiles(self, best_F: np.ndarray, tenth_F: np.ndarray) -> np.ndarray:
        """The share of its tenth's null that each best similarity exceeds, `[F]`; nan for a tenth without any."""
        found_F = np.full(len(best_F), np.nan)
        for tenth, null in enumerate(self.by_tenth):
            here = tenth_F == tenth
            if len(null):
                found_F[here] = np.searchsorted(null, best_F[here]) / len(null)
        return found_F


@dataclass(frozen=True)
class Direction:
    """What the features of one side find in the other, `[F]` in the order of the side.

    match_F, best_F: the other side's most similar feature by activity, and the correlation. percentile_F: where that
    lies in the shift null, nan without one. layers_FL: the best correlation among the features of each layer of the
    other. partner_F: the feature that is matched one to one, -1 for none. written_F: the best decoder cosine, nan
    where no layer is common, and written_match_F whose; match_cosine_F: the cosine with the match by activity.
    """

    match_F: np.ndarray
    best_F: np.ndarray
    percentile_F: np.ndarray
    layers_FL: np.ndarray
    partner_F: np.ndarray
    written_F: np.ndarray
    written_match_F: np.ndarray
    match_cosine_F: np.ndarray
    null: Null | str
    written_null: Null | str


@dataclass(frozen=True)
class Between:
    """Two sides compared: both directions, one-to-one pairs `[m, 2]` with cosines by layer, and the common layers."""

    first: Side
    second: Side
    n_tokens: int
    forward: Direction
    backward: Direction
    pairs_m2: np.ndarray
    sites: tuple[int, ...]
    pair_cosine_m: np.ndarray
    pair_cosine_mL: np.ndarray

    def rows(self) -> list[Row]:
        """The numbers of both directions and of the pair."""
        a, b = self.first, self.second
        m = len(self.pairs_m2)
        spread = rates.rate_spread(a.reading.probability_F, b.reading.probability_F, self.pairs_m2)
        alike = float((self.pair_cosine_m >= LINK).mean()) if m and self.sites else None
        pair: dict[str, Value] = {
            "tokens_common": self.n_tokens,
            "between_sites": list(self.sites),
            "between_matched": m,
            "between_matched_share": matching.matched_share(self.pairs_m2, len(a.reading), len(b.reading)),
            "between_chapman": counting.chapman(len(a.reading), len(b.reading), m),
            "between_cosine": known_mean(self.pair_cosine_m) if self.sites else None,
            "between_cosine_layers": [known_mean(column) for column in self.pair_cosine_mL.T] if m else [],
            "between_alike": alike,
        }
        at, both = Place(dictionary=a.name, against=b.name, kind="pair"), ((a, b, self.forward), (b, a, self.backward))
        rows = rows_at(at, pair)
        if isinstance(spread, str):
            rows += [Row(at, key, None, spread) for key in ("between_rate_ratio", "between_rate_sd")]
        else:
            rows += rows_at(at, {"between_rate_ratio": float(np.exp(spread.median)), "between_rate_sd": spread.sd})
        for side, other, direction in both:
            rows += _direction_rows(side, other, direction)
        return rows


def _direction_rows(side: Side, other: Side, found: Direction) -> list[Row]:
    n_layers, is_found_FL = len(side.sites), found.layers_FL >= LINK
    groups = [is_found_FL[side.strongest_F == layer] for layer in range(n_layers)]
    values: dict[str, Value] = {
        "found_share": known_mean(found.best_F >= LINK),
        "found_best": known_mean(found.best_F),
        "found_in_layers": is_found_FL.mean(0).tolist() if len(is_found_FL) else [],
        "found_by_layer": [known_mean(group.any(1)) for group in groups],
        "found_layers": [group.mean(0).tolist() if len(group) else [0.0] * len(other.sites) for group in groups],
        "partnered_share": known_mean(found.partner_F >= 0),
    }
    at = Place(dictionary=side.name, against=other.name)
    rows = rows_at(at, values)
    if isinstance(null := found.null, str):
        keys = ("found_null", "found_best_null", "beyond_null", "partnered_null")
        rows += [Row(at, key, None, null) for key in keys]
    else:
        beyond = known_mean(np.where(np.isnan(found.percentile_F), np.nan, found.percentile_F >= BEYOND))
        rows += rows_at(at, {"found_null": null.found, "found_best_null": null.mean, "beyond_null": beyond})
        rows.append(statistic_row(at, "partnered_null", null.matched))
    if np.isnan(found.written_F).all():
        return [*rows, *(Row(at, key, None, NO_LAYER) for key in ("written_share", "written_null"))]
    rows += rows_at(at, {"written_share": known_mean(found.written_F >= LINK)})
    chance = found.written_null
    return [*rows, statistic_row(at, "written_null", chance if isinstance(chance, str) else chance.found)]


def compare_sides(
    first: Side,
    second: Side,
    token_T: np.ndarray,
    document_T: np.ndarray,
    *,
    null_draws: int = NULL_DRAWS,
    seed: int = 0,
    quiet: bool = False,
) -> Between:
    """Two sides on the tokens that both have.

    token_T, document_T: the text's tokens by number, ascending, and the document of each. Decoders are compared on the
    layers that both read as the same kind, each layer in the units of `first`'s inputs; null_draws 0 leaves out nulls.
    """
    for side in (first, second):
        if not len(side.reading):
            raise ValueError(f"{side.name} has no feature that is active on more than 10 tokens; nothing to compare")
    common_T = common_tokens([first.reading, second.reading])
    sites = tuple(site for site in first.sites if site in second.sites) if first.kind == second.kind else ()
    scale_L = first.scale_L[[first.sites.index(site) for site in sites]]
    one, other = (_End.of(s.reading.on_tokens(common_T), s.decoder(sites, scale_L)) for s in (first, second))
    ends = (one, other)
    n_rows = len(ends[0].code) + null_draws * sum(len(end.sample) for end in ends)
    with Progress(
        f"comparing {first.name} and {second.name}", (1 + bool(sites)) * n_rows, unit="feature", quiet=quiet
    ) as bar:
        active, written = _both_ways(first, second, ends, bool(sites), bar)
        shifts = _draw_shifts(document_T[np.searchsorted(token_T, common_T)], null_draws, seed)
        nulls = [_shift_null(*pair, shifts, bar) for pair in (ends, ends[::-1])]
        turned = [_turn_null(*pair, bool(sites), null_draws, seed, bar) for pair in (ends, ends[::-1])]
    pairs_m2 = active.mutual_pairs(LINK)
    rows = [end.rows_FLD for end in ends]
    by_layer = [matching.pair_cosines(*(one[:, [i]] for one in rows), pairs_m2) for i in range(len(sites))]
    forward, backward = (_direction(i, ends, active, written, pairs_m2, nulls[i], turned[i]) for i in range(len(ends)))
    return Between(
        first=first,
        second=second,
        n_tokens=len(common_T),
        forward=forward,
        backward=backward,
        pairs_m2=pairs_m2,
        sites=sites,
        pair_cosine_m=matching.pair_cosines(*rows, pairs_m2),
        pair_cosine_mL=np.stack(by_layer, axis=1) if sites else np.zeros((len(pairs_m2), 0)),
    )


@dataclass(frozen=True)
class _End:
    """A side on common tokens and layers; its features' tenths by firing rate, and those that a null is measured on."""

    code: Reading
    rows_FLD: np.ndarray
    tenth_F: np.ndarray
    sample: np.ndarray

    @classmethod
    def of(cls, code: Reading, rows_FLD: np.ndarray) -> _End:
        n, order = len(code), np.argsort(code.probability_F, kind="stable")
        tenth_F = np.empty(n, dtype=np.int64)
        tenth_F[order] = np.arange(n) * TENTHS // n
        evenly = np.linspace(0, n - 1, min(n, NULL_FEATURES)).round().astype(np.int64)
        return cls(code, rows_FLD, tenth_F, np.sort(order[evenly]))


Ends = tuple[_End, _End]


def _both_ways(
    first: Side, second: Side, ends: Ends, with_decoders: bool, progress: Progress
) -> tuple[NearestByLayer, Nearest | None]:
    """The nearest features by activity, and by what they write."""
    a, b = ends
    active = NearestByLayer(first.strongest_F, second.strongest_F, len(first.sites), len(second.sites))
    matching.nearest(_watched(matching.activation_correlation(a.code.code, b.code.code), progress), active)
    if not with_decoders:
        return active, None
    return active, matching.nearest(_watched(matching.shared_cosine(a.rows_FLD, b.rows_FLD), progress))


def _direction(
    i: int,
    ends: Ends,
    active: NearestByLayer,
    written: Nearest | None,
    pairs_m2: np.ndarray,
    null: Null | str,
    written_null: Null | str,
) -> Direction:
    """What features of side number `i` find in the other one."""
    own, other = ends[i], ends[1 - i]
    match_F, best_F, layers_FL = (
        (active.index_a, active.best_a, active.layers_aL),
        (active.index_b, active.best_b, active.layers_bL),
    )[i]
    n = len(match_F)
    written_F, written_match_F, cosine_F = np.full(n, np.nan), np.full(n, -1), np.full(n, np.nan)
    if written is not None:
        written_F, written_match_F = ((written.best_a, written.index_a), (written.best_b, written.index_b))[i]
        matches_m2 = np.stack([np.arange(n), match_F], axis=1)
        cosine_F = matching.pair_cosines(own.rows_FLD, other.rows_FLD, matches_m2)
    partner_F = np.full(n, -1)
    partner_F[pairs_m2[:, i]] = pairs_m2[:, 1 - i]
    return Direction(
        match_F=match_F,
        best_F=np.clip(best_F, -1, 1),  # sums in float32 may round beyond
        percentile_F=np.full(n, np.nan) if isinstance(null, str) else null.percentiles(best_F, own.tenth_F),
        layers_FL=layers_FL,
        partner_F=partner_F,
        written_F=written_F.astype(np.float64),
        written_match_F=written_match_F,
        match_cosine_F=cosine_F,
        null=null,
        written_null=written_null,
    )


def _draw_shifts(document_T: np.ndarray, n_draws: int, seed: int) -> np.ndarray | str:
    """Shifts of the text against itself, or why there are none."""
    if not n_draws:
        return NOT_ASKED
    try:
        return circular_shifts(document_T, n_draws, seed=seed)
    except ValueError as error:  # of a text of one or two documents
        return str(error)


def _watched(similarity: Similarity, progress: Progress) -> Similarity:
    def rows(start: int, stop: int) -> np.ndarray:
        progress.advance(stop - start)
        return similarity.rows(start, stop)

    return Similarity(similarity.shape, rows)


def _shift_null(own: _End, other: _End, shifts: np.ndarray | str, progress: Progress) -> Null | str:
    """Best correlations of a sample of features with the other side's, whose activity is shifted against theirs."""
    if isinstance(shifts, str):
        return shifts
    sampled, best = sparse.csc_array(own.code.code[:, own.sample]), []
    for shift in shifts:
        moved = shift_tokens(sampled, -int(shift))
        correlation = matching.activation_correlation(moved, other.code.code)
        best.append(matching.nearest(_watched(correlation, progress)))
    return Null.of(best, own.tenth_F[own.sample], whole=len(own.sample) == len(own.code))


def _turn_null(own: _End, other: _End, with_decoders: bool, n_draws: int, seed: int, progress: Progress) -> Null | str:
    """Best cosines of a sample of features with the other side's, their entries shifted along the width."""
    if not with_decoders:
        return NO_LAYER
    if not n_draws:
        return NOT_ASKED
    width, sampled, best = own.rows_FLD.shape[2], own.rows_FLD[own.sample], []
    cosines = matching.cosines_with(other.rows_FLD)
    for turn in np.random.default_rng([seed, 1]).integers(1, max(2, width), size=n_draws):
        turned, shape = np.roll(sampled, turn, axis=2), (len(sampled), len(other.code))
        cosine = Similarity(shape, lambda start, stop, turned=turned: cosines(turned[start:stop]))
        best.append(matching.nearest(_watched(cosine, progress)))
    return Null.of(best, own.tenth_F[own.sample], whole=len(own.sample) == len(own.code))
