"""A study's numbers made again from what it kept, without the library's analysis: `python scripts/recheck.py RUN`.

A study is only worth as much as its arithmetic. RUN is a study's folder. From its readings (what every dictionary's
features write, and when they fire), the losses in its cells' files and the sizes of its subjects, everything that the
verdict rests on is computed again from the definitions, with numpy and scipy and no module of the library:

- of every dictionary: counts, entropy load, effective dimension, layers of a feature in both units, twins' share;
- of the main crosscoders of A and B: directions that two dictionaries share, u, its chance and ceiling, firing rates;
- loads, sharing and ln R at common fidelity in both currencies, their 90 % intervals, the same of every null and
  beyond it, kappa, excesses over nulls, headroom, the law of rooms, and shares of ln 2;
- every gate, every leg, and the label of the rule, whose bounds are taken from the results.

Numbers that need a model or its activations are taken from the cells' files as they are (explained variances, losses,
causal layers, rooms, what was planted), and results.json must repeat them exactly. Ends of the bootstrapped intervals
of u and of its ceiling are not made again: they are drawn; U's own are made from them.

Printed are what two sides say and how far it is apart, relative to the larger, or to 1e-3 where both are smaller (logs
of ratios to 1); of what every dictionary has the worst, with `--all` each. Exit status 1 if a number differs by more
than `--tolerance`, a reading is missing, or the results lack a number.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import reduce
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import recheck_legs as legs
import recheck_rule as rule
from recheck_between import compare_shapes, universality_of
from recheck_intervals import MOST_GROUPS, Group, Interval
from recheck_legs import MAIN, Place, Rows, Study, Trained
from recheck_readings import (
    Kept,
    documents,
    find_twins,
    load_left,
    read_kept,
    reading_numbers,
    training_numbers,
    without_duplicates,
)

KEYS = {"q": "load_log_ratio", "g": "sharing", "r": "bank_log_ratio", "room": "room_log_ratio"}
KEYS |= {"room_scaled": "room_log_ratio_scaled", "dimension": "dimension_log_ratio"}
LOGS = {*KEYS.values(), "null_excess", "removal_share"} - {"sharing"}
"""Logs of ratios, whose difference is the relative difference of the ratios, and one of these as a share of ln 2."""
SMALL = 1e-3
LOST = {"spliced_loss", "ablated_loss", "clean_loss"}
SITE: Place = {"site": "write"}


class Line(NamedTuple):
    """One number of both sides."""

    key: str
    place: str
    ours: Any
    theirs: Any
    apart: float
    each: bool


@dataclass
class Comparison:
    """Numbers beside those of the results."""

    results: Rows
    tolerance: float
    context: int
    """Tokens of a block of text."""
    lines: list[Line] = field(default_factory=list)
    n_kept: int = 0

    def number(self, key: str, at: Place, ours: Any, *, each: bool = False, ends: bool = True) -> None:
        """Compare one number, interval or list; `ends`: an interval's too. `each`: every dictionary has it."""
        known = self.results.by_key.get(key, {})
        theirs = known.get(frozenset(at.items()), "no row")
        if isinstance(theirs, Interval) and not ends:
            theirs = theirs.value
        self.pair(key, shown_place(at), ours, theirs, each=each)

    def pair(self, key: str, place: str, ours: Any, theirs: Any, *, each: bool = False) -> None:
        """Compare two values of one thing."""
        if isinstance(ours, float | Interval) and not np.isfinite(ours).all():
            ours = None
        least = 1.0 if key in LOGS else SMALL
        self.lines.append(Line(key, place, ours, theirs, apart(ours, theirs, least), each))

    def repeated(self, key: str, at: Place, kept: Any) -> None:
        """Check that the results repeat what a file of the study holds."""
        self.n_kept += 1
        theirs = self.results.by_key.get(key, {}).get(frozenset(at.items()), "no row")
        if theirs != kept:
            self.lines.append(Line(key, shown_place(at), kept, theirs, math.inf, False))

    @property
    def differing(self) -> list[Line]:
        """Lines that are further apart than may be."""
        return [line for line in self.lines if not line.apart <= self.tolerance]


def apart(ours: Any, theirs: Any, least: float = SMALL) -> float:
    """The largest difference of two values, relative to the larger or to `least`; inf for what cannot be compared.

    Ends of an interval count relative to the larger end: one that happens to be near 0 is known no better.
    """
    if isinstance(ours, Interval) and isinstance(theirs, Interval):
        least = max(least, *(abs(one) for one in (*ours, *theirs)))
    if isinstance(ours, (tuple, list)) and isinstance(theirs, (tuple, list)) and len(ours) == len(theirs):
        return max((apart(a, b, least) for a, b in zip(ours, theirs)), default=0.0)
    if isinstance(ours, int | float) and isinstance(theirs, int | float):
        return abs(ours - theirs) / max(abs(ours), abs(theirs), least)
    return 0.0 if ours == theirs else math.inf


def shown_place(at: Place) -> str:
    """A place in few words."""
    subject = f"{at.get('subject', '')}{at.get('training_seed', '')}"
    sizes = [
        f"{letter}{at[name]}" for name, letter in (("n_features", "n"), ("k", "k"), ("seed", "seed")) if name in at
    ]
    rest = [str(at[name]) for name in ("state", "site", "arm", "role", "layer", "estimator", "kind") if name in at]
    return " ".join(part for part in (subject, *rest, *sizes) if part)


def reading_file(run: Path, at: Place) -> Path:
    """Where a dictionary's reading is kept."""
    name = f"{at['subject']}{at['training_seed']}-{at['state']}-{at['site']}-{at['arm']}"
    return run / "readings" / f"{name}-n{at['n_features']}-k{at['k']}-seed{at['seed']}.safetensors"


def kept_blocks(run: Path) -> list[dict[str, Any]]:
    """Rows in the files of cells and baselines."""
    files = sorted([*(run / "cells").glob("*.json"), *(run / "baselines").glob("*.json")])
    return [block for path in files for block in json.loads(path.read_text(encoding="utf-8"))["rows"]]


def left_shares(rows: Rows, at: Place) -> np.ndarray | None:
    """The share of ablation's harm without each document."""
    found = [rows.find(f"{key}_left", **at) for key in ("spliced_loss", "clean_loss", "ablated_loss")]
    if not all(found):
        return None
    spliced_E, clean_E, ablated_E = (np.array(one[0][1]) for one in found)
    return (spliced_E - clean_E) / (ablated_E - clean_E)


def lost_shares(rows: Rows, at: Place, explained: float) -> dict[str, float | None]:
    """What a dictionary loses: variance unexplained, and the share of the harm of ablating all layers."""
    by_layer = {key: {place.get("layer"): value for place, value in rows.find(key, **at)} for key in LOST}
    layers = set(by_layer["spliced_loss"])
    layer = layers.pop() if len(layers) == 1 else "all"
    wanted = {"spliced_loss": layer, "ablated_loss": layer, "clean_loss": None}
    losses: dict[str, Any] = {key: by_layer[key].get(where) for key, where in wanted.items()}
    share = None
    if None not in losses.values():
        harm = losses["ablated_loss"] - losses["clean_loss"]
        share = (losses["spliced_loss"] - losses["clean_loss"]) / harm if harm > legs.HARM else None
    return {"fvu": 1 - explained, "loss": share}


def layer_scales(rows: Rows, at: Place) -> np.ndarray | None:
    """What each layer of the inputs was multiplied by, up to a common factor, from its variance in both units."""
    of = "untrained" if at["state"] == "untrained" else "trained"
    where = {"subject": at["subject"], "training_seed": at["training_seed"], "state": of, "site": at["site"]}
    energies = [rows.find("energy_per_layer", **where, estimator=units) for units in ("scaled", "model")]
    if not all(energies):
        return None
    return np.sqrt(np.divide(*(np.array(found[0][1]) for found in energies)))


def recheck_dictionaries(run: Path, rows: Rows, said: Comparison) -> list[Trained]:
    """Numbers of every dictionary."""
    found, block_document = [], np.unique(documents(run), return_inverse=True)[1] % MOST_GROUPS
    for at, _ in rows.find("entropy_load"):
        kept = read_kept(reading_file(run, at))
        numbers = reading_numbers(kept, layer_scales(rows, at))
        layers = [None if math.isnan(value) else value for value in kept.explained_L.tolist()]
        stored = {"explained_variance": kept.explained, "explained_variance_per_layer": layers}
        left: dict[str, Any] = {"load": None, "fvu": None, "loss": None}
        if kept.explained_left_E is not None:
            document_T = block_document[kept.token_T // said.context]
            left = {"load": load_left(kept, document_T), "fvu": 1 - kept.explained_left_E}
            left["loss"] = left_shares(rows, at)
            if at["role"] == "main" and kept.n_groups == 1:
                rest = kept.features(~find_twins(kept.rows_FLD))
                for key, part in (("raw_density", kept), ("raw_density_rest", rest)):
                    shares_E = load_left(part, document_T) / float(part.load_F.sum())
                    numbers[f"{key}_left"] = (numbers[key] * shares_E).tolist()
            stored["entropy_load_left"] = left["load"].tolist()
            stored["explained_variance_left"] = kept.explained_left_E.tolist()
        for key, value in (stored | numbers).items():
            said.number(key, at, value, each=True)
        numbers.setdefault("l0_token", kept.l0)
        found.append(Trained(at, numbers, lost_shares(rows, at, kept.explained), left))
    return found


def recheck_features(run: Path, dictionaries: Iterable[Trained], said: Comparison) -> tuple[
    dict[tuple[str, str], Group], dict[str, Interval | None]
]:  # fmt: skip
    """What main crosscoders of A and B share: numbers of each training, and values that the rule reads."""
    groups: dict[str, dict[int, list[Kept]]] = {"A": {}, "B": {}}
    for one in dictionaries:
        if all(one.at.get(name) == value for name, value in MAIN.items()) and one.at["state"] == "trained":
            kept = without_duplicates(read_kept(reading_file(run, one.at)))
            said.number("distinct", one.at, len(kept.p_F), each=True)
            groups[one.at["subject"]].setdefault(one.at["training_seed"], []).append(kept)
    every = [kept for group in groups.values() for each in group.values() for kept in each]
    common = reduce(np.intersect1d, [kept.token_T for kept in every])
    points: dict[tuple[str, str], Group] = {}
    firsts: dict[str, list[Kept]] = {}
    for name, group in groups.items():
        by_training = {t: [kept.tokens(common) for kept in each] for t, each in sorted(group.items())}
        firsts[name] = [each[0] for each in by_training.values()]
        for t, each in by_training.items():
            at = {**MAIN, "subject": name, "training_seed": t, "state": "trained"}
            for key, value in training_numbers(each).items():
                said.number(key, at, value)
                points[name, key] = (points.get((name, key)) or {}) | ({} if value is None else {t: value})
    found = compare_shapes(firsts, documents(run)[common // said.context])
    for key, value in (("u", found.u), ("u_null", found.chance), ("u_ceiling", found.ceiling)):
        said.number(key, SITE, value, ends=False)
    said.number("matched_between", SITE, found.matched)
    u, ceiling = (said.results.by_key.get(key, {}).get(frozenset(SITE.items())) for key in ("u", "u_ceiling"))
    universality = universality_of(found, u, ceiling)
    values = {"universality": universality, "rate dispersion": found.dispersion, "median log rate": found.median_rate}
    for name, value in values.items():
        said.number(name.replace(" ", "_"), SITE, value)
    return points, values


def recheck_legs(study: Study, said: Comparison) -> tuple[dict[str, Interval | None], dict[tuple[str, str], Any]]:
    """Statistics at common fidelity and what else the rule reads, and how far they are beyond nulls."""
    values: dict[str, Interval | None] = {}
    beyond: dict[tuple[str, str], Any] = {}
    for currency in rule.CURRENCIES:
        real = study.statistics("trained", currency)
        for state in study.states():
            for name, term in study.statistics(state, currency).items():
                said.number(KEYS[name], SITE | {"state": state, "estimator": currency}, term.of(state))
                if state == "trained":
                    values[f"{name}/{currency}"] = term.interval
                    continue
                left = beyond[f"{name}/{currency}", state] = real[name].less(term).interval
                said.number("null_excess", SITE | {"state": state, "estimator": f"{name}-{currency}"}, left)
    acting, twins = legs.excess(study, "conjunctive_share", legs.ACTING), legs.excess(study, "twin_share", legs.NULLS)
    known = [one for one in (acting, twins) if one is not None]
    further = {
        "kappa": legs.kappa(study),
        "conjunctive excess": acting,
        "conjunctive or twin excess": max(known, key=lambda one: one.low) if known else None,
        "removal share": legs.removal(study),
        "headroom of B": legs.headroom(study),
    }
    for name, value in further.items():
        said.number(name.removesuffix(" of B").replace(" ", "_"), SITE, value)
    return values | further, beyond


def recheck_rooms(study: Study, said: Comparison) -> None:
    """The law of rooms in both units, of a layer's loads, and shares of ln 2."""
    laws = {units: legs.fit_law(study, units) for units in ("model", "scaled")}
    for units, law in laws.items():
        at = SITE | {"estimator": units}
        if law is None:
            said.number("room_beta", at, None)
            continue
        for key, direction in (("room_beta", (1, 0)), ("room_delta", (0, 1)), ("room_excess_depth", (-0.5, 1))):
            said.number(key, at, law.along(*direction))
        said.number("room_misfit", at, law.misfit)
    for currency in rule.CURRENCIES:
        if {one.at["subject"] for one in study.of(arm="layerwise", state="trained")} > set("AB"):
            law = legs.load_law(study, currency)
            said.number("load_alpha", SITE | {"state": "trained", "estimator": currency}, law and law.along(1, 0))
        for kind, value in legs.shares(study, currency, laws["model"]).items():
            said.number("share_of_ln2", SITE | {"estimator": currency, "kind": kind}, value)


def recheck_verdict(verdict: dict[str, Any], found: rule.Judged, said: Comparison) -> None:
    """Label, legs and gates beside those in the verdict, whose numbers have three figures."""
    said.pair("label", "verdict", found.label, verdict["label"])
    said.pair("explained", "verdict", found.explained, list(verdict["explained"]))
    asked = {("gate", one["name"]): one for one in verdict["gates"]}
    asked |= {(label, one["name"]): one for label, each in verdict["legs"].items() for one in each}
    ours = {("gate", name): one for name, one in found.gates.items()}
    ours |= {(label, one.name): one for label, each in found.legs.items() for one in each}
    for name in dict.fromkeys((*asked, *ours)):
        own, theirs = ours.get(name), asked.get(name)
        place = ": ".join(name)
        said.pair("met", place, own and own.met, theirs and theirs["met"])
        if own is not None and own.found is not None and theirs is not None and own.met != "not measured":
            said.pair("measured", place, in_figures(own.found), theirs["measured"].partition(" (")[0])


def in_figures(found: Interval) -> str:
    """A number as verdicts write it."""
    value, low, high = (format(one, ".3g") for one in found)
    return value if found.low == found.high else f"{value} [{low}, {high}]"


def recheck(run: Path, tolerance: float) -> tuple[Comparison, list[Path]]:
    """Everything compared, and the readings that are missing."""
    results = json.loads((run / "results.json").read_text(encoding="utf-8"))
    blocks = kept_blocks(run)
    context = results["provenance"]["config"]["subjects"]["context"]
    said, kept = Comparison(Rows(results["rows"]), tolerance, context), Rows(blocks)
    for key, found in kept.by_key.items():
        for at, value in found.items():
            said.repeated(key, dict(at), value)
    own = [block for block in results["rows"] if "state" not in block["at"]]
    rows = Rows([*own, *blocks])
    paths = [reading_file(run, at) for at, _ in rows.find("entropy_load")]
    if missing := [path for path in paths if not path.is_file()]:
        return said, missing
    dictionaries = recheck_dictionaries(run, rows, said)
    sizes = {
        key: {at["subject"]: value for at, value in rows.find(key, training_seed=None, role=None)}
        for key in ("n_layers", "d_model")
    }
    shapes = {
        name: (sizes["n_layers"][name], sizes["d_model"][name])
        for name in sizes["n_layers"]
        if name in sizes["d_model"]
    }
    points, agreement = recheck_features(run, dictionaries, said)
    targets = results["verdict"]["rule"].get("targets", legs.TARGETS)
    study = Study(rows, dictionaries, shapes, points, targets)
    values, beyond = recheck_legs(study, said)
    recheck_rooms(study, said)
    n_trainings = {
        name: len({one.at["training_seed"] for one in study.of(**MAIN, subject=name, state="trained")}) for name in "AB"
    }
    verdict = results["verdict"]
    found = rule.judge(verdict["rule"], values | agreement, rule.gates(study), beyond, n_trainings)
    recheck_verdict(verdict, found, said)
    return said, []


def print_table(said: Comparison, *, every: bool) -> None:
    """What was compared, as a table."""
    shown, worst = list[tuple[Line, str]](), dict[str, list[Line]]()
    for line in said.lines:
        if line.each and not every:
            worst.setdefault(line.key, []).append(line)
        else:
            shown.append((line, line.place))
    for lines in worst.values():
        line = max(lines, key=lambda one: one.apart)
        shown.append((line, f"{line.place} (worst of {len(lines)})"))
        shown += [(one, one.place) for one in lines if one is not line and not one.apart <= said.tolerance]
    print("| quantity | place | recomputed | in results.json | relative difference |\n|---|---|---|---|---|")
    for line, place in shown:
        mark = "" if line.apart <= said.tolerance else " DIFFERS"
        print(f"| {line.key} | {place} | {text(line.ours)} | {text(line.theirs)} | {line.apart:.1e}{mark} |")


def text(value: Any) -> str:
    """A value in a table."""
    if isinstance(value, Interval):
        return f"{value.value:.9g} [{value.low:.9g}, {value.high:.9g}]"
    if isinstance(value, list):
        return ", ".join(text(one) for one in value) or "none"
    return "none" if value is None else f"{value:.9g}" if isinstance(value, float) else str(value)


def main(arguments: list[str] | None = None) -> int:
    """The exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a study's folder")
    parser.add_argument("--tolerance", type=float, default=1e-6, help="relative difference that may be")
    parser.add_argument("--all", action="store_true", help="print every dictionary's numbers")
    given = parser.parse_args(arguments)
    if not (given.run / "results.json").is_file():
        parser.error(f"{given.run} holds no results.json; give the folder of a finished study")
    began = time.perf_counter()
    said, missing = recheck(given.run, given.tolerance)
    print_table(said, every=given.all)
    for path in missing:
        print(f"MISSING {path}")
    n_differ = len(said.differing)
    print(f"{said.n_kept:,} numbers kept by cells, which results.json must repeat")
    print(f"{len(said.lines):,} numbers recomputed, {n_differ} differ by more than {given.tolerance:g}; "
          f"{len(missing)} readings missing; {time.perf_counter() - began:.1f} s")  # fmt: skip
    return 1 if n_differ or missing else 0


if __name__ == "__main__":
    sys.exit(main())
