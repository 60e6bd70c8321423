"""How a published number stands beside a `results.json` of ours: one rule for each claim, from plain values.

A rule says "not measured" where a key is missing, so that results of older and newer layouts can be given.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

Results = Mapping[str, Any]
Verdict = Literal["agrees", "disagrees", "not comparable", "not measured"]
MATCHED = 0.05  # relative: how far two L0 may differ and still count as equal
SIMILAR = 0.1  # difference of two explained variances that still counts as "alike"
FEW_DEAD = 0.07
LOSS_GAP = 0.03
MINORITY = 0.5
MANY_LAYERS, EVEN = 6, 0.9  # layers in which a decay can be seen; rho / L of a profile without one


@dataclass(frozen=True)
class Comparison:
    """Ours beside the claim: the number or numbers as text, the verdict, and what limits it."""

    ours: str
    verdict: Verdict
    why: str


def absent(what: str) -> Callable[[Results], Comparison]:
    return lambda results: Comparison("–", "not measured", what)


def _cells(results: Results, part: str, **wanted: Any) -> list[Mapping[str, Any]]:
    section = results.get(part)
    cells = section.get("cells") if isinstance(section, Mapping) else None
    return [cell for cell in cells or [] if all(cell.get(key) == value for key, value in wanted.items())]


def _mean(cell: Mapping[str, Any], name: str) -> float | None:
    """A quantity's mean over seeds, from the summary or else from the seeds."""
    summary = (cell.get("summary") or {}).get(name)
    if isinstance(summary, Mapping) and isinstance(summary.get("mean"), int | float):
        return float(summary["mean"])
    values = [seed.get(name) for seed in cell.get("per_seed") or []]
    numbers = [float(value) for value in values if isinstance(value, int | float)]
    return float(np.mean(numbers)) if numbers and len(numbers) == len(values) else None


def _average(results: Results, part: str, name: str, **wanted: Any) -> float | None:
    """A quantity's mean over the cells that have it."""
    values = [value for cell in _cells(results, part, **wanted) if (value := _mean(cell, name)) is not None]
    return float(np.mean(values)) if values else None


@dataclass(frozen=True)
class _Pair:
    """A crosscoder and a bank on the same site of the same trained subject."""

    n_layers: int
    crosscoder: dict[str, float]
    bank: dict[str, float]


def _pairs(results: Results) -> Iterator[_Pair]:
    names = ("explained_variance", "l0_token", "l0_token_layer")
    for cell in _cells(results, "quality", arm="crosscoder", state="trained", role="main"):
        same = {key: cell.get(key) for key in ("subject", "site", "state", "role")}
        for bank in _cells(results, "quality", arm="layerwise", **same):
            per_layer = (bank.get("per_seed") or [{}])[0].get("explained_variance_per_layer")
            both = [{**{name: _mean(one, name) for name in names}, "n": one.get("n_features")} for one in (cell, bank)]
            if per_layer and all(value is not None for one in both for value in one.values()):
                yield _Pair(len(per_layer), *both)  # ty: ignore[invalid-argument-type]


def over_pairs(results: Results, judge: Callable[[_Pair], Comparison | None], why_not: str) -> Comparison:
    """The verdict of all comparable pairs together: agreement and disagreement at once is no verdict."""
    pairs = list(_pairs(results))
    if not pairs:
        return Comparison("–", "not measured", "no crosscoder and bank on one site")
    found = [comparison for pair in pairs if (comparison := judge(pair)) is not None]
    if not found:
        return Comparison("–", "not comparable", why_not)
    ours = "; ".join(one.ours for one in found)
    verdicts = {one.verdict for one in found}
    if len(verdicts) > 1:
        return Comparison(ours, "not comparable", "sites or subjects differ among themselves")
    return Comparison(ours, found[0].verdict, found[0].why)


def fewer_features(pair: _Pair) -> Comparison | None:
    bank_size = pair.bank["n"] * pair.n_layers
    shown = (
        f"{pair.crosscoder['n']:.0f} features: EV {pair.crosscoder['explained_variance']:.3f}, against "
        f"{bank_size:.0f}: {pair.bank['explained_variance']:.3f}"
    )
    gain = pair.crosscoder["explained_variance"] - pair.bank["explained_variance"]
    if pair.crosscoder["n"] <= bank_size and gain >= 0 and pair.crosscoder["l0_token"] <= pair.bank["l0_token"]:
        return Comparison(shown, "agrees", "direction only, at fewer active features a token; no factor was measured")
    if pair.crosscoder["n"] >= bank_size and gain < 0 and pair.crosscoder["l0_token"] >= pair.bank["l0_token"]:
        return Comparison(shown, "disagrees", "with as many features and as many active")
    return None


def equal_compute(pair: _Pair) -> Comparison | None:
    ours, bank = pair.crosscoder, pair.bank
    equal_l0 = abs(ours["l0_token_layer"] / bank["l0_token_layer"] - 1) <= MATCHED if bank["l0_token_layer"] else False
    if ours["n"] != bank["n"] or not equal_l0:
        return None
    shown = f"EV {ours['explained_variance']:.3f} (crosscoder), {bank['explained_variance']:.3f} (bank)"
    better = bank["explained_variance"] > ours["explained_variance"]
    return Comparison(shown, "agrees" if better else "disagrees", "direction only; no factor was measured")


def total_l0(pair: _Pair) -> Comparison | None:
    ours, bank = pair.crosscoder, pair.bank
    if ours["n"] != bank["n"] or not ours["l0_token"]:
        return None
    ratio = bank["l0_token"] / ours["l0_token"]
    better = ours["explained_variance"] >= bank["explained_variance"]
    shown = f"{ratio:.2g}x lower over {pair.n_layers} layers, EV {'not lower' if better else 'lower'}"
    why = "direction only: L0 is set by us, and the factor grows with the number of layers (18 there)"
    if better == (ratio > 1):
        return Comparison(shown, "agrees" if better else "disagrees", why)
    return None


def feature_profiles(results: Results) -> Comparison:
    """Profiles over the layers of the deepest subject: a shallow one has no decay to see."""
    cells = _cells(results, "spread", state="trained")
    depth = max((len(cell.get("layers") or []) for cell in cells), default=0)
    deepest = [cell for cell in cells if len(cell.get("layers") or []) >= depth - 1]  # writes have a layer less
    pairs = [(_mean(cell, "single_layer_share"), _mean(cell, "mean_rho_share")) for cell in deepest]
    known = [pair for pair in pairs if None not in pair]
    if not known:
        return Comparison("–", "not measured", "no crosscoder's spread")
    single, share = np.array(known, dtype=np.float64).mean(0)
    shown = f"single-layer share {single:.3f}, rho / L {share:.3f} over {depth} layers"
    if depth < MANY_LAYERS:
        return Comparison(shown, "not comparable", f"fewer than {MANY_LAYERS} layers: too few to see a decay")
    why = "no share was published; decoder norms alone do not show that a layer uses a feature"
    return Comparison(shown, "agrees" if single < MINORITY and share < EVEN else "disagrees", why)


def drift(results: Results) -> Comparison:
    cosine = _average(results, "spread", "mean_adjacent_cosine", state="trained")
    widths = [one.get("d_model") for one in (results.get("subjects") or {}).values() if isinstance(one, Mapping)]
    if cosine is None or not widths or not all(isinstance(width, int) for width in widths):
        return Comparison("–", "not measured", "no adjacent cosine")
    chance = min(widths) ** -0.5
    verdict: Verdict = "agrees" if 3 * chance < cosine < 0.99 else "disagrees"
    return Comparison(f"adjacent cosine {cosine:.3f}, chance {chance:.3f}", verdict, "neighbouring layers only")


def functional_layers(results: Results) -> Comparison:
    seeds = [seed for cell in _cells(results, "spread", state="trained") for seed in cell.get("per_seed", ())]
    probed = [found for seed in seeds if (found := seed.get("functional"))]
    both = [(found.get("functional_rho"), found.get("decoder_rho")) for found in probed]
    pairs = [pair for pair in both if None not in pair]
    if not pairs:
        return Comparison("–", "not measured", "functional spread is not in these results")
    functional, norm = np.mean(pairs, axis=0)
    shown = f"functional rho {functional:.2f}, by norm {norm:.2f}"
    return Comparison(shown, "agrees" if functional <= 2 else "disagrees", "our participation ratio, their coherence")


def shared_by_seeds(results: Results) -> Comparison:
    cells = _cells(results, "counts", arm="layerwise", state="trained", role="main")
    shares = [(cell.get("pair") or {}).get("matched_share") for cell in cells]
    numbers = [share for share in shares if isinstance(share, int | float)]
    if not numbers:
        return Comparison("–", "not measured", "one dictionary seed")
    share = float(np.mean(numbers))
    why = "direction only (a minority): ours matches by correlation > .7, theirs by weights, in a far larger SAE"
    return Comparison(f"{share:.3f}", "agrees" if share < MINORITY else "disagrees", why)


def pairwise_mcc(results: Results) -> Comparison:
    cells = _cells(results, "counts", arm="layerwise", state="trained", role="main")
    numbers = [value for cell in cells if isinstance(value := (cell.get("pair") or {}).get("pw_mcc"), int | float)]
    if not numbers:
        return Comparison("–", "not measured", "these results hold no mean cosine of matched seeds")
    value = float(np.mean(numbers))
    return Comparison(f"{value:.3f}", "agrees" if value >= 0.75 else "disagrees", "theirs after far longer training")


def dead(results: Results) -> Comparison:
    dead = _average(results, "quality", "dead_share", arm="layerwise", state="trained", role="main")
    if dead is None:
        return Comparison("–", "not measured", "no bank")
    why = "direction only: far fewer features, and dead is counted on our held-out text"
    return Comparison(f"{dead:.3f}", "agrees" if dead <= FEW_DEAD else "disagrees", why)


def planted_recovery(results: Results) -> Comparison:
    rows = [row for row in results.get("rows") or [] if isinstance(row, Mapping)]
    points = [(row.get("explained_variance"), row.get("recall")) for row in rows]
    good = [(ev, recall) for ev, recall in points if isinstance(ev, float) and isinstance(recall, float) and ev >= 0.71]
    if not good:
        return Comparison("–", "not measured", "no planted world in this file (crosscoder synthetic)")
    ev, recall = min(good, key=lambda point: point[1])
    shown = f"worst recall at cosine .9 {recall:.2f} at EV {ev:.2f}, of {len(good)} dictionaries"
    why = "theirs is a far larger world; ours asks whether high explained variance can hide low recovery"
    return Comparison(shown, "agrees" if recall <= MINORITY else "disagrees", why)


def random_models(results: Results) -> Comparison:
    for arm in ("layerwise", "crosscoder"):
        wanted: dict[str, Any] = {"arm": arm, "site": "residual", "role": "main"}
        states = ("trained", "untrained")
        trained, untrained = (_average(results, "quality", "explained_variance", state=s, **wanted) for s in states)
        if trained is not None and untrained is not None:
            verdict: Verdict = "agrees" if abs(trained - untrained) <= SIMILAR else "disagrees"
            what = "explained variance alone" + ("" if arm == "layerwise" else ", of crosscoders")
            return Comparison(f"EV {trained:.3f} trained, {untrained:.3f} untrained", verdict, what)
    return Comparison("–", "not measured", "no untrained control")


def equal_parameters(results: Results) -> Comparison:
    subjects = [one for one in (results.get("subjects") or {}).values() if isinstance(one, Mapping)]
    curves = [{p["tokens"]: p["held_out_loss"] for p in one.get("curve") or []} for one in subjects]
    if len(subjects) != 2 or not (common := set.intersection(*(set(curve) for curve in curves))):
        return Comparison("–", "not measured", "no two subjects with losses at equal tokens")
    sizes = [(one.get("parameters") or {}).get("non_embedding") or 0 for one in subjects]
    if not all(sizes) or max(sizes) / min(sizes) - 1 > MATCHED:
        return Comparison("–", "not comparable", "the two do not have equal parameters")
    losses = [curve[max(common)] for curve in curves]
    gap = losses[1] / losses[0] - 1
    shapes = ", ".join(f"({one.get('n_layers')}, {one.get('d_model')})" for one in subjects)
    why = "at equal tokens; theirs are far larger, and corrected for small differences of size"
    return Comparison(f"{shapes}: {gap:+.1%}", "agrees" if abs(gap) <= LOSS_GAP else "disagrees", why)


_NO_STRUCTURE = Comparison("–", "not measured", "no structured crosscoder in these results")
_ENDS = ("bank", "batch_topk, acausal")


def _variants(results: Results, *names: str) -> dict[str, float] | None:
    """Explained variances of the named variants and of both ends, of a table of variants; None where one is missing."""
    rows = {row.get("variant"): row for row in results.get("table") or [] if isinstance(row, Mapping)}
    found = {name: rows.get(name, {}).get("explained_variance") for name in (_ENDS[0], *names, _ENDS[1])}
    return None if None in found.values() else {name: float(value) for name, value in found.items() if value}


def _listed(found: Mapping[str, float]) -> str:
    return "EV " + ", ".join(f"{value:.3f} ({name})" for name, value in found.items())


def weakly_causal(results: Results) -> Comparison:
    """A weakly causal crosscoder lies between the bank and the acausal one."""
    found = _variants(results, "weakly causal")
    if found is None:
        return _NO_STRUCTURE
    verdict: Verdict = "agrees" if found["bank"] < found["weakly causal"] < found[_ENDS[1]] else "disagrees"
    return Comparison(_listed(found), verdict, "direction only, at equal n and L0; it also has fewer parameters")


def local_windows(results: Results) -> Comparison:
    """Windows rise from the bank to the acausal crosscoder."""
    found = _variants(results, "window of 2", "window of 4")
    if found is None:
        return _NO_STRUCTURE
    rising = list(found.values())
    verdict: Verdict = "agrees" if rising == sorted(rising) and len(set(rising)) == len(rising) else "disagrees"
    return Comparison(_listed(found), verdict, "two widths, at equal n and L0; parameters rise with the width")
