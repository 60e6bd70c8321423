"""Published numbers, as data, and how each stands beside a `results.json` of ours.

Every claim has one rule for all results. A rule reads plain results by key and says "not measured" where a key is
missing, so that results of older and newer layouts can be given. Most published studies are thousands of times larger
than ours: rules judge directions, and say where numbers cannot be compared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

Results = Mapping[str, Any]
Verdict = Literal["agrees", "disagrees", "not comparable", "not measured"]
Checked = Literal["text", "abstract", "second-hand"]

CHECKED = {
    "text": "read in a stored copy or transcript of the paper",
    "abstract": "read in the abstract",
    "second-hand": "not found in what could be read; quoted from others",
}
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


@dataclass(frozen=True, kw_only=True)
class Claim:
    """One published number.

    ours: where in `results.json` the number stands that it is held against.
    rule: when ours agrees, in words; `compare` is the same as a function of plain results.
    """

    key: str
    source: str
    where: str
    checked: Checked
    setting: str
    figure: str
    ours: str
    rule: str
    compare: Callable[[Results], Comparison]


def _absent(what: str) -> Callable[[Results], Comparison]:
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


def _over_pairs(results: Results, judge: Callable[[_Pair], Comparison | None], why_not: str) -> Comparison:
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


def _fewer_features(pair: _Pair) -> Comparison | None:
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


def _equal_compute(pair: _Pair) -> Comparison | None:
    ours, bank = pair.crosscoder, pair.bank
    equal_l0 = abs(ours["l0_token_layer"] / bank["l0_token_layer"] - 1) <= MATCHED if bank["l0_token_layer"] else False
    if ours["n"] != bank["n"] or not equal_l0:
        return None
    shown = f"EV {ours['explained_variance']:.3f} (crosscoder), {bank['explained_variance']:.3f} (bank)"
    better = bank["explained_variance"] > ours["explained_variance"]
    return Comparison(shown, "agrees" if better else "disagrees", "direction only; no factor was measured")


def _total_l0(pair: _Pair) -> Comparison | None:
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


def _feature_profiles(results: Results) -> Comparison:
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


def _drift(results: Results) -> Comparison:
    cosine = _average(results, "spread", "mean_adjacent_cosine", state="trained")
    widths = [one.get("d_model") for one in (results.get("subjects") or {}).values() if isinstance(one, Mapping)]
    if cosine is None or not widths or not all(isinstance(width, int) for width in widths):
        return Comparison("–", "not measured", "no adjacent cosine")
    chance = min(widths) ** -0.5
    verdict: Verdict = "agrees" if 3 * chance < cosine < 0.99 else "disagrees"
    return Comparison(f"adjacent cosine {cosine:.3f}, chance {chance:.3f}", verdict, "neighbouring layers only")


def _functional_layers(results: Results) -> Comparison:
    seeds = [seed for cell in _cells(results, "spread", state="trained") for seed in cell.get("per_seed", ())]
    probed = [found for seed in seeds if (found := seed.get("functional"))]
    both = [(found.get("functional_rho"), found.get("decoder_rho")) for found in probed]
    pairs = [pair for pair in both if None not in pair]
    if not pairs:
        return Comparison("–", "not measured", "functional spread is not in these results")
    functional, norm = np.mean(pairs, axis=0)
    shown = f"functional rho {functional:.2f}, by norm {norm:.2f}"
    return Comparison(shown, "agrees" if functional <= 2 else "disagrees", "our participation ratio, their coherence")


def _shared_by_seeds(results: Results) -> Comparison:
    cells = _cells(results, "counts", arm="layerwise", state="trained", role="main")
    shares = [(cell.get("pair") or {}).get("matched_share") for cell in cells]
    numbers = [share for share in shares if isinstance(share, int | float)]
    if not numbers:
        return Comparison("–", "not measured", "one dictionary seed")
    share = float(np.mean(numbers))
    why = "direction only (a minority): ours matches by correlation > .7, theirs by weights, in a far larger SAE"
    return Comparison(f"{share:.3f}", "agrees" if share < MINORITY else "disagrees", why)


def _pairwise_mcc(results: Results) -> Comparison:
    cells = _cells(results, "counts", arm="layerwise", state="trained", role="main")
    numbers = [value for cell in cells if isinstance(value := (cell.get("pair") or {}).get("pw_mcc"), int | float)]
    if not numbers:
        return Comparison("–", "not measured", "these results hold no mean cosine of matched seeds")
    value = float(np.mean(numbers))
    return Comparison(f"{value:.3f}", "agrees" if value >= 0.75 else "disagrees", "theirs after far longer training")


def _dead(results: Results) -> Comparison:
    dead = _average(results, "quality", "dead_share", arm="layerwise", state="trained", role="main")
    if dead is None:
        return Comparison("–", "not measured", "no bank")
    why = "direction only: far fewer features, and dead is counted on our held-out text"
    return Comparison(f"{dead:.3f}", "agrees" if dead <= FEW_DEAD else "disagrees", why)


def _planted_recovery(results: Results) -> Comparison:
    rows = [row for row in results.get("rows") or [] if isinstance(row, Mapping)]
    points = [(row.get("explained_variance"), row.get("recall")) for row in rows]
    good = [(ev, recall) for ev, recall in points if isinstance(ev, float) and isinstance(recall, float) and ev >= 0.71]
    if not good:
        return Comparison("–", "not measured", "no planted world in this file (crosscoder synthetic)")
    ev, recall = min(good, key=lambda point: point[1])
    shown = f"worst recall at cosine .9 {recall:.2f} at EV {ev:.2f}, of {len(good)} dictionaries"
    why = "theirs is a far larger world; ours asks whether high explained variance can hide low recovery"
    return Comparison(shown, "agrees" if recall <= MINORITY else "disagrees", why)


def _random_models(results: Results) -> Comparison:
    for arm in ("layerwise", "crosscoder"):
        wanted: dict[str, Any] = {"arm": arm, "site": "residual", "role": "main"}
        states = ("trained", "untrained")
        trained, untrained = (_average(results, "quality", "explained_variance", state=s, **wanted) for s in states)
        if trained is not None and untrained is not None:
            verdict: Verdict = "agrees" if abs(trained - untrained) <= SIMILAR else "disagrees"
            what = "explained variance alone" + ("" if arm == "layerwise" else ", of crosscoders")
            return Comparison(f"EV {trained:.3f} trained, {untrained:.3f} untrained", verdict, what)
    return Comparison("–", "not measured", "no untrained control")


def _equal_parameters(results: Results) -> Comparison:
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


_CROSSCODERS = ("Lindsey et al. 2024", "transformer-circuits.pub/2024/crosscoders")
_NO_STRUCTURE = _absent("no structured crosscoder in these results")

CLAIMS: tuple[Claim, ...] = (
    Claim(
        key="feature-efficiency", source=_CROSSCODERS[0], where=f"{_CROSSCODERS[1]}, section 3.1", checked="text",
        setting="residual stream of an 18-layer model; L1 of norms; loss is squared error plus penalty",
        figure="a crosscoder needs about 8 times fewer features in all than per-layer SAEs for the same loss",
        ours="quality.cells[].explained_variance, n_features",
        rule="the crosscoder explains at least as much with no more features and no more of them active",
        compare=lambda r: _over_pairs(r, _fewer_features, "one side has more features or more active ones"),
    ),
    Claim(
        key="flop-efficiency", source=_CROSSCODERS[0], where=f"{_CROSSCODERS[1]}, section 3.1", checked="text",
        setting="the same; a crosscoder with n features costs what L SAEs of n cost",
        figure="about 2 times less efficient per training FLOP than per-layer SAEs, at large budgets",
        ours="quality.cells[].explained_variance at equal n_features and L0 a layer",
        rule="at equal n and equal L0 a token and layer the bank explains more",
        compare=lambda r: _over_pairs(r, _equal_compute, "n or L0 a token and layer is not equal"),
    ),
    Claim(
        key="total-l0", source=_CROSSCODERS[0], where=f"{_CROSSCODERS[1]}, section 3.1", checked="text",
        setting="the same, at equal training FLOPs",
        figure="L0 summed over layers 15 to 40 times lower, with smaller error",
        ours="quality.cells[].l0_token at equal n_features",
        rule="at equal n: fewer active in the whole model, and no less explained",
        compare=lambda r: _over_pairs(r, _total_l0, "n is not equal, or one side has both more active and less error"),
    ),
    Claim(
        key="profiles", source=_CROSSCODERS[0], where=f"{_CROSSCODERS[1]}, section 3.2", checked="text",
        setting="decoder norms over layers of random features; no share is given",
        figure="most features peak in one layer; the decay is often gradual, over many or all layers",
        ours="spread.cells[].single_layer_share, mean_rho_share",
        rule="over 6 or more layers: under half live in one, and mean rho / L is below .9",
        compare=_feature_profiles,
    ),
    Claim(
        key="drift", source=_CROSSCODERS[0], where=f"{_CROSSCODERS[1]}, section 3.2", checked="text",
        setting="cosine of a feature's decoder between layers",
        figure="far more stable than chance, yet most drift",
        ours="spread.cells[].mean_adjacent_cosine", rule="above 3 times chance (1 / sqrt D) and below .99",
        compare=_drift,
    ),
    Claim(
        key="weakly-causal", source=_CROSSCODERS[0], where=f"{_CROSSCODERS[1]}, section 3.3.2", checked="text",
        setting="each feature read from one layer, written to it and all later ones",
        figure="needs 3 to 4 times the features of the global crosscoder; per FLOP between it and SAEs",
        ours="none yet", rule="explained variance lies between bank and crosscoder at equal n",
        compare=_NO_STRUCTURE,
    ),
    Claim(
        key="local-windows", source=_CROSSCODERS[0], where=f"{_CROSSCODERS[1]}, section 3.3.1", checked="text",
        setting="features in windows of K layers", figure="loss runs fairly linearly in K, without a best K",
        ours="none yet", rule="explained variance rises with K, between bank and crosscoder",
        compare=_NO_STRUCTURE,
    ),
    Claim(
        key="functional-layers", source="Demou et al. 2026 (fmxcoders)", where="arXiv 2605.09438", checked="abstract",
        setting="standard crosscoders on GPT2-Small, Pythia-410M and -1.4B, Gemma2-2B",
        figure="one or two layers drive a feature on average, though decoder norms are spread evenly",
        ours="spread.cells[].per_seed[].functional", rule="functional rho at most 2",
        compare=_functional_layers,
    ),
    Claim(
        key="chat-only", source="Minder et al. 2025", where="arXiv 2504.02922", checked="second-hand",
        setting="Gemma 2 2B, base and chat; crosscoders with L1 and with BatchTopK (abstract: direction only)",
        figure="3,176 features only in the chat model with L1, 134 with BatchTopK",
        ours="none yet", rule="L1 reports several times as many exclusive features",
        compare=_absent("no pair of a base and a tuned model"),
    ),
    Claim(
        key="seeds", source="Paulo and Belrose 2025", where="arXiv 2501.16615", checked="abstract",
        setting="SAE with 131K latents on a feed-forward block of Llama 3 8B",
        figure="30 % of features shared by two seeds", ours="counts.cells[].pair.matched_share (bank)",
        rule="less than half is shared", compare=_shared_by_seeds,
    ),
    Claim(
        key="pw-mcc", source="Song et al. 2025", where="arXiv 2505.20254", checked="abstract",
        setting="TopK SAEs on activations of language models",
        figure="mean cosine of matched features of two seeds (PW-MCC) .80 can be reached",
        ours="counts.cells[].pair.pw_mcc (bank)", rule="at least .75", compare=_pairwise_mcc,
    ),
    Claim(
        key="dead", source="Gao et al. 2024", where="arXiv 2406.04093, section 2.4", checked="text",
        setting="TopK SAE with 16 million latents on GPT-4; transposed start, AuxK",
        figure="7 % dead", ours="quality.cells[].dead_share (bank)", rule="at most 7 %", compare=_dead,
    ),
    Claim(
        key="recovery", source="Korznikov et al. 2026", where="arXiv 2602.14111", checked="abstract",
        setting="planted features, several SAE architectures",
        figure="9 % of true features recovered at 71 % explained variance",
        ours="rows[].recall, explained_variance of `crosscoder synthetic`",
        rule="some dictionary of ours explains at least 71 % and recovers at most half", compare=_planted_recovery,
    ),
    Claim(
        key="random-models", source="Heap et al. 2025", where="arXiv 2501.17727", checked="abstract",
        setting="SAEs on Pythia models, trained and with random weights",
        figure="reconstruction and interpretability scores are alike in many settings",
        ours="quality.cells[].explained_variance, trained and untrained (bank)",
        rule="explained variances within .1", compare=_random_models,
    ),
    Claim(
        key="shapes", source="Kaplan et al. 2020", where="arXiv 2001.08361, section 3.1", checked="text",
        setting="transformers with equal parameters outside the embedding",
        figure="6 layers of 4288 within 3 % of the loss of 48 layers of 1600",
        ours="subjects.*.curve[].held_out_loss at equal tokens", rule="within 3 %", compare=_equal_parameters,
    ),
    Claim(
        key="layer-variance", source="Lawson et al. 2024 (MLSAE)", where="arXiv 2409.04185", checked="abstract",
        setting="one SAE for all layers of Pythia models; spread of a latent's activity over layers",
        figure="variance about 100 times larger over many tokens than at one token",
        ours="none yet", rule="at least 10 times larger", compare=_absent("no SAE shared by all layers"),
    ),
)  # fmt: skip


def compare_published(results: Results) -> dict[str, Comparison]:
    """Every claim's comparison with one file of results, by the claim's key."""
    return {claim.key: claim.compare(results) for claim in CLAIMS}


def published_table(named: Sequence[tuple[str, Results]] = ()) -> list[str]:
    """Markdown lines: a row for each claim, and for each named file of results what it says to it."""
    header = ["source", "measured there", "published", "checked", "ours", "agrees if"]
    header += [f"ours: {name}" for name, _ in named]
    compared = [compare_published(results) for _, results in named]
    rows = []
    for claim in CLAIMS:
        row = [f"{claim.source}, {claim.where}", claim.setting, claim.figure, claim.checked, claim.ours, claim.rule]
        for by_key in compared:
            one = by_key[claim.key]
            row.append(f"{one.ours}; **{one.verdict}** ({one.why})")
        rows.append([cell.replace("|", "\\|") for cell in row])
    return ["| " + " | ".join(line) + " |" for line in (header, ["---"] * len(header), *rows)]
