"""Published numbers beside ours: `python scripts/published.py` writes docs/published.md.

The numbers, and the results of ours that are set beside them, are in docs/published.toml; here are the rules. Most
published studies are thousands of times larger than ours: rules judge directions, and say where numbers cannot be
compared.
"""

from __future__ import annotations

import itertools
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from crosscoder.foundation.artifact import read_json
from crosscoder.results.file import from_document
from crosscoder.results.table import COMPARED, LongTable

DOCS = Path(__file__).parents[1] / "docs"
PUBLISHED = tomllib.loads((DOCS / "published.toml").read_text(encoding="utf-8"))
Judged = Literal["agrees", "disagrees", "not comparable", "not measured"]
MATCHED = 0.05  # relative: how far two L0 or sizes may differ and still count as equal
SIMILAR = 0.1  # difference of two explained variances that still counts as "alike"
FEW_DEAD = 0.07
LOSS_GAP = 0.03
MINORITY = 0.5
EXPLAINED = 0.71
MANY_LAYERS, EVEN = 6, 0.9  # layers in which a decay can be seen; rho / L of a profile without one
ENDS = ("bank", "batch_topk, acausal")  # variants between which structured crosscoders are expected
HEAD = """# Published numbers beside ours

Written by `python scripts/published.py` from the facts of published.toml and the rules of the script. A verdict is
about the direction of a claim unless the row says otherwise: the published studies are far larger than ours. "Not
comparable" means that ours has the quantity, but not under the claim's conditions; "not measured" that the file does
not hold it.

How far each figure was checked against its source:
"""


@dataclass(frozen=True)
class Ours:
    """What one of our files holds: rows of a study, or explained variances of a table of variants by name."""

    rows: LongTable = field(default_factory=lambda: LongTable(()))
    variants: dict[str, float] = field(default_factory=dict)

    def means(self, key: str, **where: Any) -> list[float]:
        """A quantity's mean over the seeds of each dictionary that has it."""
        cells = self.rows.select(key, **where).groups("subject", "training_seed", "state", "site", "arm", "n_features")
        return [found.value for cell in cells.values() if (found := cell.seed_range(key)) is not None]


@dataclass(frozen=True)
class Comparison:
    """Ours beside the claim: the number or numbers as text, the verdict, and what limits it."""

    ours: str
    verdict: Judged
    why: str


def missing(why: str) -> Comparison:
    return Comparison("–", "not measured", why)


def judged(ours: str, agrees: bool, why: str) -> Comparison:
    return Comparison(ours, "agrees" if agrees else "disagrees", why)


@dataclass(frozen=True)
class Pair:
    """A crosscoder and a bank on the same site of the same trained model."""

    n_layers: int
    crosscoder: dict[str, float]
    bank: dict[str, float]

    @property
    def gain(self) -> float:
        """How much more of the variance the crosscoder explains."""
        return self.crosscoder["explained_variance"] - self.bank["explained_variance"]


def pairs_of(ours: Ours) -> Iterator[Pair]:
    keys = ("explained_variance", "l0_token", "l0_token_layer")
    fields = ("subject", "training_seed", "site", "arm", "n_features")
    cells = ours.rows.select(state="trained", role="main").groups(*fields)
    for at, crosscoder in cells.items():
        for other, bank in cells.items():
            same = all(getattr(at, name) == getattr(other, name) for name in fields[:3])
            if not same or (at.arm, other.arm) != ("crosscoder", "layerwise"):
                continue
            found = [[cell.seed_range(key) for key in keys] for cell in (crosscoder, bank)]
            layers = bank.values("explained_variance_per_layer")
            if layers and None not in [*found[0], *found[1]]:
                both = [{key: one.value for key, one in zip(keys, side, strict=True) if one} for side in found]
                both[0]["n"], both[1]["n"] = at.n_features or 0, other.n_features or 0
                yield Pair(len(layers[0]), *both)


def over_pairs(judge: Callable[[Pair], Comparison | None], why_not: str) -> Callable[[Ours], Comparison]:
    """The verdict of all comparable pairs together: agreement and disagreement at once is no verdict."""

    def compare(ours: Ours) -> Comparison:
        pairs = list(pairs_of(ours))
        found = [comparison for pair in pairs if (comparison := judge(pair)) is not None]
        if not pairs:
            return missing("no crosscoder and bank on one site")
        if not found:
            return Comparison("–", "not comparable", why_not)
        shown = "; ".join(one.ours for one in found)
        if len({one.verdict for one in found}) > 1:
            return Comparison(shown, "not comparable", "sites or subjects differ among themselves")
        return Comparison(shown, found[0].verdict, found[0].why)

    return compare


def fewer_features(pair: Pair) -> Comparison | None:
    one, bank, size = pair.crosscoder, pair.bank, pair.bank["n"] * pair.n_layers
    shown = f"{one['n']} features: EV {one['explained_variance']:.3f}, against {size}: {bank['explained_variance']:.3f}"
    if one["n"] <= size and pair.gain >= 0 and one["l0_token"] <= bank["l0_token"]:
        return judged(shown, True, "direction only, at fewer active features a token; no factor was measured")
    if one["n"] >= size and pair.gain < 0 and one["l0_token"] >= bank["l0_token"]:
        return judged(shown, False, "with as many features and as many active")
    return None


def equal_compute(pair: Pair) -> Comparison | None:
    one, bank = pair.crosscoder, pair.bank
    if one["n"] != bank["n"] or abs(one["l0_token_layer"] - bank["l0_token_layer"]) > MATCHED * bank["l0_token_layer"]:
        return None
    shown = f"EV {one['explained_variance']:.3f} (crosscoder), {bank['explained_variance']:.3f} (bank)"
    return judged(shown, pair.gain < 0, "direction only; no factor was measured")


def total_l0(pair: Pair) -> Comparison | None:
    one, bank = pair.crosscoder, pair.bank
    if one["n"] != bank["n"] or not one["l0_token"]:
        return None
    ratio, better = bank["l0_token"] / one["l0_token"], pair.gain >= 0
    if better != (ratio > 1):
        return None
    shown = f"{ratio:.2g}x lower over {pair.n_layers} layers, EV {'not lower' if better else 'lower'}"
    return judged(
        shown, better, "direction only: L0 is set by us, and the factor grows with the number of layers (18 there)"
    )


def feature_profiles(ours: Ours) -> Comparison:
    """Profiles over the layers of the deepest subject: a shallow one has no decay to see."""
    labels = [(row.at, len(row.value)) for row in ours.rows.select("layers", state="trained") if row.value]  # ty: ignore[invalid-argument-type]
    depth = max((n for _, n in labels), default=0)
    deepest = [at.known() for at, n in labels if n >= depth - 1]  # writes have a layer less
    single, share = (
        [v for at in deepest for v in ours.means(key, **at)] for key in ("single_layer_share", "mean_rho_share")
    )
    if not single or not share:
        return missing("no crosscoder's spread")
    shown = f"single-layer share {np.mean(single):.3f}, rho / L {np.mean(share):.3f} over {depth} layers"
    if depth < MANY_LAYERS:
        return Comparison(shown, "not comparable", f"fewer than {MANY_LAYERS} layers: too few to see a decay")
    why = "no share was published; decoder norms alone do not show that a layer uses a feature"
    return judged(shown, bool(np.mean(single) < MINORITY and np.mean(share) < EVEN), why)


def drift(ours: Ours) -> Comparison:
    cosines, widths = ours.means("mean_adjacent_cosine", state="trained"), ours.rows.values("d_model", role=None)
    if not cosines or not widths:
        return missing("no adjacent cosine")
    cosine, chance = float(np.mean(cosines)), min(widths) ** -0.5
    shown = f"adjacent cosine {cosine:.3f}, chance {chance:.3f}"
    return judged(shown, 3 * chance < cosine < 0.99, "neighbouring layers only")


def functional_layers(ours: Ours) -> Comparison:
    by_norm = {row.at: row.value for row in ours.rows.select("decoder_rho", state="trained")}
    rows = ours.rows.select("functional_rho", state="trained")
    both = [(row.value, by_norm.get(row.at)) for row in rows]
    known = [pair for pair in both if None not in pair]
    if not known:
        return missing("functional spread is not in these results")
    functional, norm = np.mean(np.array(known, dtype=np.float64), axis=0)
    why = "our participation ratio, their coherence"
    return judged(f"functional rho {functional:.2f}, by norm {norm:.2f}", bool(functional <= 2), why)


def shared_by_seeds(ours: Ours) -> Comparison:
    shares = ours.means("matched_share", arm="layerwise", state="trained", role="main")
    if not shares:
        return missing("one dictionary seed")
    share = float(np.mean(shares))
    why = "direction only (a minority): ours matches by correlation > .7, theirs by weights, in a far larger SAE"
    return judged(f"{share:.3f}", share < MINORITY, why)


def dead(ours: Ours) -> Comparison:
    shares = ours.means("dead_share", arm="layerwise", state="trained", role="main")
    if not shares:
        return missing("no bank")
    share = float(np.mean(shares))
    why = "direction only: far fewer features, and dead is counted on our held-out text"
    return judged(f"{share:.3f}", share <= FEW_DEAD, why)


def planted_recovery(ours: Ours) -> Comparison:
    explained = {row.at: row.value for row in ours.rows.select("explained_variance")}
    points: list[tuple[Any, Any]] = [(explained.get(row.at), row.value) for row in ours.rows.select("recall")]
    good = [point for point in points if None not in point and point[0] >= EXPLAINED]
    if not good:
        return missing("no planted world in this file (crosscoder synthetic)")
    ev, recall = min(good, key=lambda point: point[1])
    shown = f"worst recall at cosine .9 {recall:.2f} at EV {ev:.2f}, of {len(good)} dictionaries"
    why = "theirs is a far larger world; ours asks whether high explained variance can hide low recovery"
    return judged(shown, recall <= MINORITY, why)


def random_models(ours: Ours) -> Comparison:
    for arm in ("layerwise", "crosscoder"):
        wanted = {"arm": arm, "site": "residual", "role": "main"}
        trained, untrained = (ours.means("explained_variance", state=s, **wanted) for s in ("trained", "untrained"))
        if trained and untrained:
            a, b = np.mean(trained), np.mean(untrained)
            what = "explained variance alone" + ("" if arm == "layerwise" else ", of crosscoders")
            return judged(f"EV {a:.3f} trained, {b:.3f} untrained", bool(abs(a - b) <= SIMILAR), what)
    return missing("no untrained control")


def equal_parameters(ours: Ours) -> Comparison:
    """A against B where the shorter of the two runs ends; the longer one's loss there is between two checkpoints."""

    def known(key: str) -> list[Any]:
        return [ours.rows.one(key, subject=name, role=None) for name in COMPARED]

    curves = list(zip(known("curve_tokens"), known("curve_loss"), strict=True))
    if not all(tokens and losses for tokens, losses in curves):
        return missing("no two subjects with losses along their training")
    sizes = known("parameters_non_embedding")
    if max(sizes) / min(sizes) - 1 > MATCHED:
        return Comparison("–", "not comparable", "the two do not have equal parameters")
    end = min(tokens[-1] for tokens, _ in curves)
    if any(tokens[0] > end for tokens, _ in curves):
        return Comparison("–", "not comparable", "one was first measured after the other had ended")
    first, second = (np.interp(np.log(end), np.log(np.array(tokens)), losses) for tokens, losses in curves)
    gap = float(second / first - 1)
    shapes = ", ".join(map(str, zip(known("n_layers"), known("d_model"), strict=True)))
    why = f"at {end:,} tokens, where the shorter run ends; theirs are far larger, and corrected for size"
    return judged(f"{shapes}: {gap:+.1%}", abs(gap) <= LOSS_GAP, why)


def between_ends(names: tuple[str, ...], why: str) -> Callable[[Ours], Comparison]:
    """Explained variance rises from the bank over the named variants to the acausal crosscoder."""

    def compare(ours: Ours) -> Comparison:
        wanted = (ENDS[0], *names, ENDS[1])
        found = {name: ours.variants[name] for name in wanted if name in ours.variants}
        if len(found) < len(wanted):
            return missing("no structured crosscoder in these results")
        rising = list(found.values())
        shown = "EV " + ", ".join(f"{value:.3f} ({name})" for name, value in found.items())
        return judged(shown, all(a < b for a, b in itertools.pairwise(rising)), why)

    return compare


RULES: dict[str, Callable[[Ours], Comparison]] = {
    "feature-efficiency": over_pairs(fewer_features, "one side has more features or more active ones"),
    "flop-efficiency": over_pairs(equal_compute, "n or L0 a token and layer is not equal"),
    "total-l0": over_pairs(total_l0, "n is not equal, or one side has both more active and less error"),
    "profiles": feature_profiles,
    "drift": drift,
    "weakly-causal": between_ends(
        ("weakly causal",), "direction only, at equal n and L0; it also has fewer parameters"
    ),
    "local-windows": between_ends(
        ("window of 2", "window of 4"), "two widths, at equal n and L0; parameters rise with the width"
    ),
    "functional-layers": functional_layers,
    "seeds": shared_by_seeds,
    "dead": dead,
    "recovery": planted_recovery,
    "random-models": random_models,
    "shapes": equal_parameters,
}


def compare(ours: Ours) -> dict[str, Comparison]:
    """How every claim stands beside one file of ours."""
    return {
        key: missing(claim["absent"]) if "absent" in claim else RULES[key](ours)
        for key, claim in PUBLISHED["claims"].items()
    }


def page(named: dict[str, Ours]) -> str:
    """The page in Markdown: a row for each claim, a column for each file."""
    compared = [compare(ours) for ours in named.values()]
    lines = [["source", "measured there", "published", "checked", "ours", "agrees if", *(f"ours: {n}" for n in named)]]
    lines.append(["---"] * len(lines[0]))
    for key, claim in PUBLISHED["claims"].items():
        line = [f"{claim['source']}, {claim['where']}", claim["setting"], claim["figure"], claim["checked"]]
        line += [", ".join(claim["ours"]) or "–", claim["agrees"]]
        line += [f"{one[key].ours}; **{one[key].verdict}** ({one[key].why})" for one in compared]
        lines.append([cell.replace("|", "\\|") for cell in line])
    checked = [f"- *{name}*: {meaning}" for name, meaning in PUBLISHED["checked"].items()]
    return "\n".join([HEAD, *checked, "", *(f"| {' | '.join(line)} |" for line in lines), ""])


def committed() -> dict[str, Ours]:
    """Our files by the names of their columns."""
    return {name: read(DOCS.parent / path) for name, path in PUBLISHED["results"].items()}


def read(path: Path) -> Ours:
    """The results of a study, or a table of variants."""
    found = read_json(path)
    if "table" in found:
        return Ours(variants={row["variant"]: row["explained_variance"] for row in found["table"]})
    return Ours(from_document(found).rows)


def main() -> None:
    """Write the page."""
    target = DOCS / "published.md"
    target.write_text(page(committed()), encoding="utf-8")
    print(target)


if __name__ == "__main__":
    main()
