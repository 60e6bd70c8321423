"""Cells and subjects put together into one results value: the seed paper's table, the answer, what was matched.

All arithmetic here is on finished numbers; intervals are ranges over dictionary seeds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from crosscoder.analysis import capacity, counting, splice
from crosscoder.foundation.provenance import describe_run

SCHEMA = "crosscoder.results/1"
SATURATED = 0.8  # alive share from which a dictionary is said to return its own size

DEFINITIONS = {
    **counting.DEFINITIONS,
    **capacity.DEFINITIONS,
    **splice.DEFINITIONS,
    "parameters": "N: entries of all matrices outside the embedding, about 12 L d^2.",
    "neurons": "Neurons of a layer: its residual width D. Total neurons: L * D.",
    "residual": "Site 'residual': the residual stream as it leaves each block, before the final norm.",
    "write": "Site 'write': what each block adds to the stream, x_l - x_(l-1).",
    "scale": "Each layer is multiplied by one number so that its usual norm (mean over tokens within ten times the "
    "median) is sqrt(D); the first position of every sequence is dropped.",
    "control": "The same subjects with their initial, untrained weights, through the same pipeline.",
    "rho": "Spread: participation ratio rho = 1 / sum over layers of e^2, with e the share of a feature's squared "
    "decoder norm on each layer; from 1 (one layer) to L (evenly on all).",
    "lifespan": "Lifespan of a crosscoder feature: layers holding at least half of its largest share e.",
    "adjacent_cosine": "Mean cosine of a feature's decoder rows on neighbouring layers that it occupies; 1 means that "
    "it keeps its direction.",
    "features_per_layer": "Features per layer. Per-layer bank: alive features of one layer, on average. Crosscoder: "
    "distinct features times mean rho, over L, since a feature counts on every layer it occupies.",
    "explained_variance": "1 - squared error / variance, sums over held-out tokens and widths before the ratio; "
    "'overall' also sums over the scaled layers.",
    "l0_token": "L0 of a token over the whole model: active features of the crosscoder, or of all layers' SAEs.",
    "l0_token_layer": "L0 of a token and layer: an SAE's active features; for the crosscoder, active features that "
    "hold the layer in their lifespan.",
    "interval": "[low, high] is the range over dictionary seeds of one trained subject: it says how far the "
    "dictionary's randomness moves a number, not how far another training run would.",
    "ratio": "B / A, with the interval from B's low over A's high to B's high over A's low.",
}


def matched_item(quantity: str, values: dict[str, Any], matched: bool | None, note: str) -> dict[str, Any]:
    """One row of what was matched and what was not."""
    return {"quantity": quantity, "values": values, "matched": matched, "note": note}


def assemble(
    cells: Sequence[dict[str, Any]],
    *,
    subjects: dict[str, Any],
    matched: Sequence[dict[str, Any]],
    config: dict[str, Any],
    kind: str,
    preset: str,
    seconds: dict[str, float],
    text: str,
    tokens_fingerprint: str,
) -> dict[str, Any]:
    """The whole results value, as documented in docs/results.md."""
    table = paper_table(cells, subjects)
    provenance = {
        **describe_run(config),
        "schema": SCHEMA,
        "kind": kind,
        "preset": preset,
        "seconds": seconds,
        "text": text,
        "tokens_fingerprint": tokens_fingerprint,
    }
    return {
        "subjects": subjects,
        "matched": {"items": [*matched, *_dictionary_items(cells, list(subjects))]},
        "counts": {
            "answer": answer(cells, subjects),
            "table": table,
            "cells": [cell["counts"] for cell in cells],
        },
        "spread": {"cells": [cell["spread"] for cell in cells if cell["spread"] and cell["spread"]["role"] == "main"]},
        "quality": {"cells": [cell["quality"] for cell in cells]},
        "definitions": DEFINITIONS,
        "provenance": provenance,
    }


def find_cell(cells: Sequence[dict[str, Any]], **wanted: str) -> dict[str, Any] | None:
    """The main cell with the given subject, state, site and arm, if it was run."""
    for cell in cells:
        identity = cell["counts"]
        if identity["role"] == "main" and all(identity[key] == value for key, value in wanted.items()):
            return cell
    return None


def ratio(b: dict[str, float], a: dict[str, float]) -> dict[str, float] | None:
    """B / A with the widest interval that the two ranges allow; None where A may be zero or below."""
    if min(a.values()) <= 0:
        return None
    return {"mean": b["mean"] / a["mean"], "low": b["low"] / a["high"], "high": b["high"] / a["low"]}


def _exactly(value: float) -> dict[str, float]:
    return {"mean": value, "low": value, "high": value}


def _row(quantity: str, values: dict[str, Any], group: str, definition: str | None) -> dict[str, Any]:
    both = ratio(values["B"], values["A"]) if {"A", "B"} <= values.keys() else None
    return {"quantity": quantity, "values": values, "ratio": both, "definition": definition, "group": group}


# Rows taken from the cells of one arm: (section, key, words, definition).
_PER_LAYER_ROWS = (
    ("counts", "alive", "features learned, summed over layers", "alive"),
    ("counts", "features_per_layer", "features per layer", "features_per_layer"),
    ("counts", "per_neuron_layer", "features per neuron, per layer", "per_neuron_layer"),
    ("counts", "merged", "distinct features after merging layers", "merged"),
    ("counts", "merged_low", "distinct features, low end of the band", "merged"),
    ("counts", "merged_high", "distinct features, high end of the band", "merged"),
    ("pair", "survival", "survival to the next layer, seed-corrected", "survival"),
    ("pair", "lifespan", "lifespan in layers, seed-corrected", "lifespan_bank"),
    ("pair", "corrected", "distinct features, seed-corrected", "corrected"),
    ("pair", "matched_share", "share of features found again by another seed", "chapman"),
    ("quality", "explained_variance", "explained variance", "explained_variance"),
    ("quality", "dead_share", "dead share", "dead_share"),
)
_CROSS_LAYER_ROWS = (
    ("counts", "distinct", "features learned", "distinct"),
    ("pair", "chapman", "features by capture-recapture", "chapman"),
    ("spread", "mean_rho", "layers a feature occupies (mean rho)", "rho"),
    ("spread", "mean_rho_share", "mean rho as a share of L", "rho"),
    ("counts", "features_per_layer", "features per layer", "features_per_layer"),
    ("counts", "per_neuron_layer", "features per neuron, per layer", "per_slot"),
    ("counts", "per_neuron_joint", "features per neuron, joint", "per_neuron_joint"),
    ("counts", "effective_dimension", "effective dimension (raw)", "effective_dimension"),
    ("counts", "entropy_load", "entropy load, nats a token", "entropy_load"),
    ("pair", "matched_share", "share of features found again by another seed", "chapman"),
    ("quality", "explained_variance", "explained variance", "explained_variance"),
    ("quality", "dead_share", "dead share", "dead_share"),
)


def _number(cell: dict[str, Any] | None, section: str, key: str) -> dict[str, float] | None:
    if cell is None:
        return None
    if section == "pair":
        pair = cell["counts"]["pair"]
        return None if pair is None or pair.get(key) is None else _exactly(float(pair[key]))
    return (cell[section] or {}).get("summary", {}).get(key)


def paper_table(cells: Sequence[dict[str, Any]], subjects: dict[str, Any]) -> list[dict[str, Any]]:
    """The seed paper's table with measured values: subjects, per-layer and cross-layer counts, and the control."""
    rows = [
        _row(
            words,
            {name: _exactly(float(value(subject))) for name, subject in subjects.items()},
            "subject",
            definition,
        )
        for words, definition, value in (
            ("parameters outside the embedding", "parameters", lambda s: s["parameters"]["non_embedding"]),
            ("layers", "neurons", lambda s: s["n_layers"]),
            ("neurons per layer", "neurons", lambda s: s["neurons_per_layer"]),
            ("total neurons", "neurons", lambda s: s["total_neurons"]),
        )
    ]
    for state in ("trained", "untrained"):
        for site, place in (("residual", "residual stream"), ("write", "block writes")):
            for arm, group, wanted in (
                ("layerwise", "per-layer", _PER_LAYER_ROWS),
                ("crosscoder", "cross-layer", _CROSS_LAYER_ROWS),
            ):
                found = {name: find_cell(cells, subject=name, state=state, site=site, arm=arm) for name in subjects}
                for section, key, words, definition in wanted:
                    values = {name: _number(cell, section, key) for name, cell in found.items()}
                    if not values or any(value is None for value in values.values()):
                        continue
                    if state == "untrained":
                        label = f"untrained, {place}, {'bank' if arm == 'layerwise' else 'crosscoder'}: {words}"
                        rows.append(_row(label, values, "control", definition))
                    else:
                        rows.append(_row(f"{place}: {words}", values, group, definition))
    return rows


def _interval(value: dict[str, float], digits: int = 2) -> str:
    if value["low"] == value["high"]:
        return f"{value['mean']:.{digits}f}"
    return f"{value['mean']:.{digits}f} [{value['low']:.{digits}f}, {value['high']:.{digits}f}]"


def _density_ratio(cells: Sequence[dict[str, Any]], state: str, site: str, arm: str) -> dict[str, float] | None:
    """Features per neuron and layer, B over A."""
    found = [
        _number(find_cell(cells, subject=name, state=state, site=site, arm=arm), "counts", "per_neuron_layer")
        for name in ("A", "B")
    ]
    if found[0] is None or found[1] is None:
        return None
    return ratio(found[1], found[0])


def answer(cells: Sequence[dict[str, Any]], subjects: dict[str, Any]) -> list[str]:
    """The answer in two sentences: what was measured, and what that does and does not support."""
    if set(subjects) != {"A", "B"}:
        return _answer_for_one(cells, next(iter(subjects)))
    cross = {
        (state, site): _density_ratio(cells, state, site, "crosscoder")
        for state in ("trained", "untrained")
        for site in ("residual", "write")
    }
    r, w = cross["trained", "residual"], cross["trained", "write"]
    if r is None or w is None:
        return ["The crosscoder cells of both subjects are missing.", "Nothing can be said."]
    n = subjects["A"]["parameters"]["non_embedding"]
    first = (
        f"At {n:,} parameters and held-out losses of {subjects['A']['held_out_loss']:.3f} (A) and "
        f"{subjects['B']['held_out_loss']:.3f} (B) nats a token, crosscoders of equal size put {_interval(r)} times as "
        f"many features on a neuron of B as on one of A in the residual stream and {_interval(w)} times in the block "
        "writes, where 2 is the paradox and 1 would be reconciliation."
    )
    return [first, _support(cells, cross)]


def _support(cells: Sequence[dict[str, Any]], cross: dict[tuple[str, str], dict[str, float] | None]) -> str:
    mains = [cell for cell in cells if cell["counts"]["role"] == "main" and cell["counts"]["state"] == "trained"]
    alive = [1 - cell["quality"]["summary"]["dead_share"]["high"] for cell in mains]
    if min(alive) >= SATURATED:
        share = math.floor(100 * min(alive))  # "at least" must not be rounded up
        limit = (
            f"This is spread, not yet a count: at least {share}% of every dictionary is alive, so the number of "
            "features is the number that was asked for and only the layers each occupies are measured"
        )
    else:
        limit = (
            f"Counts here are not yet trustworthy: between {min(alive):.0%} and {max(alive):.0%} of the dictionaries "
            "is alive, and dead features are a failure of training before they are a sign of few features"
        )
    controls = [(site, cross["untrained", site]) for site in ("residual", "write")]
    shown = " and ".join(f"{_interval(value)} ({site})" for site, value in controls if value)
    apart = [site for site, value in controls if value and _apart(cross["trained", site], value)]
    if not shown:
        control = "no untrained control was run, so none of this can be laid to training"
    elif not _have_width(cross):
        control = f"the untrained pair gives {shown}, and one dictionary seed cannot tell whether that differs"
    elif apart:
        control = f"the untrained pair gives {shown}, which differs on the {_words(apart)}"
    else:
        control = f"the untrained pair gives {shown}, so training is not what these ratios show"
    return f"{limit}; {control}; with one training run of each shape no verdict is given."


def _have_width(cross: dict[tuple[str, str], dict[str, float] | None]) -> bool:
    return all(value["high"] > value["low"] for value in cross.values() if value)


def _apart(a: dict[str, float] | None, b: dict[str, float]) -> bool:
    return a is not None and (a["low"] > b["high"] or a["high"] < b["low"])


def _words(sites: Sequence[str]) -> str:
    names = {"residual": "residual stream", "write": "block writes"}
    return " and ".join(names[site] for site in sites)


def _answer_for_one(cells: Sequence[dict[str, Any]], name: str) -> list[str]:
    bank = find_cell(cells, subject=name, state="trained", site="residual", arm="layerwise")
    cross = find_cell(cells, subject=name, state="trained", site="residual", arm="crosscoder")
    if bank is None or cross is None:
        return ["One of the two arms is missing.", "Nothing can be compared."]
    b, c, s = bank["counts"]["summary"], cross["counts"]["summary"], cross["spread"]["summary"]
    n_layers = len(cross["quality"]["per_seed"][0]["explained_variance_per_layer"])
    first = (
        f"On {n_layers} layers the per-layer bank has {_interval(b['alive'], 0)} alive features that merge to "
        f"{_interval(b['merged'], 0)} distinct ones (band {b['merged_low']['low']:.0f} to "
        f"{b['merged_high']['high']:.0f} by rule), and the crosscoder has {_interval(c['distinct'], 0)} distinct "
        f"features that occupy {_interval(s['mean_rho'])} of {n_layers} layers each."
    )
    q = [cell["quality"]["summary"] for cell in (bank, cross)]
    second = (
        f"The bank explains {q[0]['explained_variance']['mean']:.1%} of the variance with "
        f"{q[0]['l0_token']['mean']:.0f} active features a token and the crosscoder "
        f"{q[1]['explained_variance']['mean']:.1%} with {q[1]['l0_token']['mean']:.0f}; "
        f"{1 - q[0]['dead_share']['mean']:.0%} and "
        f"{1 - q[1]['dead_share']['mean']:.0%} of the dictionaries are alive, so counts near the dictionary's size say "
        "more about the dictionary than about the model."
    )
    return [first, second]


def _dictionary_items(cells: Sequence[dict[str, Any]], names: list[str]) -> list[dict[str, Any]]:
    """What of the dictionaries was made equal, from what they turned out to be."""
    items = []
    for site in ("residual", "write"):
        for arm in ("layerwise", "crosscoder"):
            found = {name: find_cell(cells, subject=name, state="trained", site=site, arm=arm) for name in names}
            if any(cell is None for cell in found.values()):
                continue
            for section, key, words, tolerance in (
                ("counts", "dictionary_size", "dictionary size", 0.0),
                ("quality", "explained_variance", "explained variance", 0.05),
                ("quality", "l0_token", "L0 of a token", 0.05),
            ):
                values = {name: _number(cell, section, key) for name, cell in found.items()}
                means = {name: value["mean"] for name, value in values.items() if value}
                items.append(
                    matched_item(
                        f"{arm}, {site}: {words}",
                        means,
                        _within(list(means.values()), tolerance) if len(means) > 1 else None,
                        "equal" if tolerance == 0 else f"within {tolerance:.0%}, relative",
                    )
                )
    return items


def _within(values: Sequence[float], tolerance: float) -> bool:
    low, high = min(values), max(values)
    return math.isclose(low, high) or (high - low) <= tolerance * abs(high)
