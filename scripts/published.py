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
from crosscoder.results.file import read_results
from crosscoder.results.table import COMPARED, SITE_NAME, Estimate, LongTable

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
KEPT = 0.99  # adjacent cosine of a feature that does not drift
FEW_LAYERS = 2.0
THEIR_SITE = "residual"  # what Lindsey et al. read
ENDS = ("bank", "batch_topk, acausal")  # variants between which structured crosscoders are expected
HEAD = """# Published numbers beside ours

Written by `python scripts/published.py` from the facts of published.toml and the rules of the script. A verdict is
about the direction of a claim unless the row says otherwise: the published studies are far larger than ours. "Not
comparable" means that ours has the quantity, but not under the claim's conditions, or that our settings decide it;
"not measured" that the file does not hold it.

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
    """A crosscoder and a bank on one site of the same trainings of one model; numbers over all their seeds."""

    where: str
    n_layers: int
    crosscoder: dict[str, Estimate]
    bank: dict[str, Estimate]
    sizes: tuple[int, int]
    """Features of the crosscoder, and of each of the bank's layers."""

    @property
    def explained(self) -> tuple[Estimate, Estimate]:
        """By the crosscoder, by the bank."""
        return self.crosscoder["explained_variance"], self.bank["explained_variance"]

    @property
    def gain(self) -> int:
        """1 where the crosscoder explains more than the bank, -1 where less, 0 where ranges over seeds overlap."""
        one, bank = self.explained
        return int(one.low > bank.high) - int(one.high < bank.low)


def pairs_of(ours: Ours) -> Iterator[Pair]:
    keys = ("explained_variance", "l0_token", "l0_token_layer")
    cells = ours.rows.select(state="trained", role="main").groups("subject", "site", "arm", "n_features")
    for at, crosscoder in cells.items():
        for other, bank in cells.items():
            same = (at.subject, at.site) == (other.subject, other.site)
            if not same or (at.arm, other.arm) != ("crosscoder", "layerwise"):
                continue
            trainings = [{row.at.training_seed for row in one.select(keys[0])} for one in (crosscoder, bank)]
            both = {"training_seed": tuple(trainings[0] & trainings[1])}
            found = [{key: one.seed_range(key, **both) for key in keys} for one in (crosscoder, bank)]
            layers = bank.values("explained_variance_per_layer", **both)
            if layers and None not in [*found[0].values(), *found[1].values()]:
                known: list[Any] = found
                sizes = at.n_features or 0, other.n_features or 0
                yield Pair(f"{at.subject}, {at.site}", len(layers[0]), *known, sizes)


def over_pairs(judge: Callable[[Pair], Comparison | None], why_not: str) -> Callable[[Ours], Comparison]:
    """The verdict of all comparable pairs together: agreement and disagreement at once is no verdict."""

    def compare(ours: Ours) -> Comparison:
        pairs = list(pairs_of(ours))
        found = [(pair, comparison) for pair in pairs if (comparison := judge(pair)) is not None]
        if not pairs:
            return missing("no crosscoder and bank on one site")
        if not found:
            return Comparison("–", "not comparable", why_not)
        shown = "; ".join(f"{pair.where}: {one.ours}" for pair, one in found)
        if len({one.verdict for _, one in found}) > 1:
            return Comparison(shown, "not comparable", "sites or subjects differ among themselves")
        left = len(pairs) - len(found)
        said = f"; not comparable in {left} of {len(pairs)} places: {why_not}" if left else ""
        return Comparison(shown, found[0][1].verdict, found[0][1].why + said)

    return compare


def fewer_features(pair: Pair) -> Comparison | None:
    (n, width), (one, bank) = pair.sizes, pair.explained
    size, active = width * pair.n_layers, pair.crosscoder["l0_token"].value - pair.bank["l0_token"].value
    shown = f"{n} features: EV {one.value:.3f}, against {size}: {bank.value:.3f}"
    if n <= size and pair.gain > 0 and active <= 0:
        return judged(shown, True, "direction only, at fewer active features a token; no factor was measured")
    if n >= size and pair.gain < 0 and active >= 0:
        return judged(shown, False, "with as many features and as many active")
    return None


def equal_compute(pair: Pair) -> Comparison | None:
    one, bank = (side["l0_token_layer"].value for side in (pair.crosscoder, pair.bank))
    if pair.sizes[0] != pair.sizes[1] or abs(one - bank) > MATCHED * bank or not pair.gain:
        return None
    joint, by_layer = pair.explained
    shown = f"EV {joint.value:.3f} (crosscoder), {by_layer.value:.3f} (bank)"
    return judged(shown, pair.gain < 0, "direction only; no factor was measured")


def total_l0(pair: Pair) -> Comparison | None:
    one, bank = pair.crosscoder["l0_token"].value, pair.bank["l0_token"].value
    if pair.sizes[0] != pair.sizes[1]:
        return None
    joint, by_layer = (found.value for found in pair.explained)
    shown = f"L0 {one:.1f} against {bank:.1f} over {pair.n_layers} layers, EV {joint:.3f} against {by_layer:.3f}"
    return Comparison(shown, "not comparable", "k sets L0 here, in both arms; theirs came out of training")


def feature_profiles(ours: Ours) -> Comparison:
    """Profiles over the layers of the deepest subject's residual stream: a shallow one has no decay to see."""
    labels = [(row.at, row.value) for row in ours.rows.select("layers", state="trained", site=THEIR_SITE)]
    depth = max((len(value) for _, value in labels if isinstance(value, list)), default=0)
    deepest = [at.known() for at, value in labels if isinstance(value, list) and len(value) == depth]
    single, share = (
        [v for at in deepest for v in ours.means(key, **at)] for key in ("single_layer_share", "mean_rho_share")
    )
    if not single or not share:
        return missing(f"no crosscoder's spread on the {SITE_NAME[THEIR_SITE]}")
    shown = f"single-layer share {np.mean(single):.3f}, rho / L {np.mean(share):.3f} over {depth} layers"
    if depth < MANY_LAYERS:
        return Comparison(shown, "not comparable", f"fewer than {MANY_LAYERS} layers: too few to see a decay")
    why = "by decoder norm, every layer at its own scale: not where the subject uses a feature; no share was published"
    return judged(shown, bool(np.mean(single) < MINORITY and np.mean(share) < EVEN), why)


def drift(ours: Ours) -> Comparison:
    """Against the untrained model, whose stream hands directions on too: chance alone is too low a bar."""
    where = {"arm": "crosscoder", "site": THEIR_SITE, "role": "main"}
    found = {state: ours.means("mean_adjacent_cosine", state=state, **where) for state in ("trained", "untrained")}
    if not all(found.values()):
        return missing(f"no adjacent cosine on the {SITE_NAME[THEIR_SITE]}, trained and untrained")
    trained, untrained = (float(np.mean(values)) for values in found.values())
    shown = f"adjacent cosine {trained:.3f}, untrained {untrained:.3f}"
    if untrained >= trained:
        why = "the stream hands directions on without training too, so that chance is no bar"
        return Comparison(shown, "not comparable", why)
    return judged(shown, trained < KEPT, "neighbouring layers only")


def acting_layers(ours: Ours) -> Comparison:
    """Of the deepest subject's writes: a shallow one has few layers to act on, whatever its features do."""
    where = {"state": "trained", "arm": "crosscoder", "role": "main", "site": "write"}
    acted = {row.at.subject for row in ours.rows.select("causal_layers", **where)}
    depths = {name: ours.rows.one("n_layers", subject=name, role=None) or 0 for name in acted}
    if not depths:
        return missing("no feature was ablated layer by layer")
    deepest = max(depths, key=lambda name: depths[name])
    acting, norm = (np.mean(ours.means(key, subject=deepest, **where)) for key in ("causal_layers", "mean_rho"))
    shown = f"{acting:.2f} causal layers, {norm:.2f} by norm at each layer's scale"
    if depths[deepest] < MANY_LAYERS:
        return Comparison(shown, "not comparable", f"fewer than {MANY_LAYERS} layers: few could act")
    return judged(shown, bool(acting <= FEW_LAYERS), "effect on logits of ablations; theirs is a coherence")


def shared_by_seeds(ours: Ours) -> Comparison:
    shares = ours.means("matched_share", arm="layerwise", state="trained", role="main")
    if not shares:
        return missing("one dictionary seed")
    share = float(np.mean(shares))
    why = "direction only (a minority): ours matches by correlation > .7, theirs by weights, in a far larger SAE"
    return judged(f"{share:.3f}", share < MINORITY, why)


def dead(ours: Ours) -> Comparison:
    where = {"arm": "layerwise", "state": "trained", "role": "main"}
    shares, cells = ours.means("dead_share", **where), ours.rows.select("dead_share", **where)
    if not shares:
        return missing("no bank")
    share, most = float(np.mean(shares)), max(row.at.n_features or 0 for row in cells)
    if share <= FEW_DEAD:
        why = f"at most {most:,} features a layer: with so few, few are dead whatever is done"
        return Comparison(f"{share:.3f}", "not comparable", why)
    return judged(f"{share:.3f}", False, "direction only: dead is counted on our held-out text")


def planted_recovery(ours: Ours) -> Comparison:
    """Of crosscoders: a bank's merged features miss those of several layers whatever it explains."""
    explained = {row.at: row.value for row in ours.rows.select("explained_variance")}
    of_one = ours.rows.select("recall", arm=("crosscoder", None), estimator=None)
    points: list[tuple[Any, Any]] = [(explained.get(row.at), row.value) for row in of_one]
    good = [point for point in points if None not in point and point[0] >= EXPLAINED]
    if not good:
        return missing("no planted world in this file (crosscoder synthetic)")
    ev, recall = min(good, key=lambda point: point[1])
    shown = f"worst recall at cosine .9 {recall:.2f} at EV {ev:.2f}, of {len(good)} crosscoders"
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
    "feature-efficiency": over_pairs(fewer_features, "fewer features and less explained, or seeds differ as much"),
    "flop-efficiency": over_pairs(equal_compute, "n or L0 a token and layer is not equal, or seeds differ as much"),
    "total-l0": over_pairs(total_l0, "n is not equal"),
    "profiles": feature_profiles,
    "drift": drift,
    "weakly-causal": between_ends(
        ("weakly causal",), "direction only, at equal n and L0; it also has fewer parameters"
    ),
    "local-windows": between_ends(
        ("window of 2", "window of 4"), "two widths, at equal n and L0; parameters rise with the width"
    ),
    "acting-layers": acting_layers,
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
    return Ours(read_results(path).rows)


def main() -> None:
    """Write the page."""
    target = DOCS / "published.md"
    target.write_text(page(committed()), encoding="utf-8")
    print(target)


if __name__ == "__main__":
    main()
