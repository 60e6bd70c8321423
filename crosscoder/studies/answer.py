"""Cells and subjects put together into one results value: the seed paper's table, the answer, what was matched.

All arithmetic here is on finished numbers; ranges are over training and dictionary seeds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from crosscoder.foundation.provenance import describe_run
from crosscoder.measure import counting, dimension, probes, recovery, splice
from crosscoder.measure.dimension import CEILING as C
from crosscoder.studies import calibration
from crosscoder.verdict import evidence
from triton_kernels.cpu.native import build

SCHEMA = "crosscoder.results/2"

DEFINITIONS = {
    **evidence.DEFINITIONS,
    **probes.DEFINITIONS,
    **recovery.DEFINITIONS,
    **calibration.DEFINITIONS,
    **counting.DEFINITIONS,
    **dimension.DEFINITIONS,
    **splice.DEFINITIONS,
    "parameters": "N: entries of all matrices outside the embedding, about 12 L d^2.",
    "neurons": "Neurons of a layer: its residual width D. Total neurons: L * D.",
    "residual": "Site 'residual': the residual stream as it leaves each block, before the final norm.",
    "write": "Site 'write': what each block adds to the stream, x_l - x_(l-1).",
    "scale": "Each layer is multiplied by one number so that its usual norm (mean over tokens within ten times the "
    "median) is sqrt(D); the first position of every sequence is dropped.",
    "ceiling_constant": f"C of the headroom, measured on planted worlds: {C.value:.3g} [{C.low:.3g}, {C.high:.3g}]; "
    "headroom's interval is that of C alone.",
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
    "seed_range": "In the tables [low, high] is the range over training and dictionary seeds that were run; the "
    "verdict's intervals are bootstrapped.",
    "seed_ratio": "B / A, with the range from B's low over A's high to B's high over A's low.",
}


def matched_item(quantity: str, values: dict[str, Any], matched: bool | None, note: str) -> dict[str, Any]:
    """One row of what was matched and what was not."""
    return {"quantity": quantity, "values": values, "matched": matched, "note": note}


def assemble(
    cells: Sequence[dict[str, Any]],
    *,
    subjects: dict[str, Any],
    matched: Sequence[dict[str, Any]],
    judged: dict[str, Any] | None = None,
    config: dict[str, Any],
    kind: str,
    preset: str,
    seconds: dict[str, float],
    text: str,
    tokens_fingerprint: str,
) -> dict[str, Any]:
    """The whole results value, as documented in docs/results.md."""
    table = paper_table(cells, subjects)
    run = describe_run(config)
    provenance = {
        **run,
        "device": {**run["device"], "cpu_kernels": build.form()},
        "schema": SCHEMA,
        "kind": kind,
        "preset": preset,
        "seconds": seconds,
        "text": text,
        "tokens_fingerprint": tokens_fingerprint,
    }
    return {
        "verdict": judged,
        "subjects": subjects,
        "matched": {"items": [*matched, *_dictionary_items(cells, list(subjects))]},
        "counts": {
            "answer": answer(cells, subjects, judged),
            "table": table,
            "cells": [cell["counts"] for cell in cells],
        },
        "spread": {"cells": [cell["spread"] for cell in cells if cell["spread"] and cell["spread"]["role"] == "main"]},
        "quality": {"cells": [cell["quality"] for cell in cells]},
        "definitions": DEFINITIONS,
        "provenance": provenance,
    }


def find_cells(cells: Sequence[dict[str, Any]], **wanted: str) -> list[dict[str, Any]]:
    """The main cells with the given subject, state, site and arm: one for each training seed that was run."""
    return [
        cell
        for cell in cells
        if cell["counts"]["role"] == "main" and all(cell["counts"][key] == value for key, value in wanted.items())
    ]


def ratio(b: dict[str, float], a: dict[str, float]) -> dict[str, float] | None:
    """B / A with the widest interval that the two ranges allow; None where A may be zero or below."""
    if min(a.values()) <= 0:
        return None
    return {"mean": b["mean"] / a["mean"], "low": b["low"] / a["high"], "high": b["high"] / a["low"]}


def _exactly(value: float) -> dict[str, float]:
    return {"mean": value, "low": value, "high": value}


def _row(quantity: str, values: dict[str, Any], group: str, definition: str | None) -> dict[str, Any]:
    both = ratio(values["B"], values["A"]) if values.get("A") and values.get("B") else None
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


def _number(cells: Sequence[dict[str, Any]], section: str, key: str) -> dict[str, float] | None:
    """Mean and range over training seeds and dictionary seeds; None where a cell lacks the number, or there is none."""
    found = [_of_cell(cell, section, key) for cell in cells]
    known = [value for value in found if value is not None]
    if not known or len(known) < len(found):
        return None
    return {
        "mean": sum(value["mean"] for value in known) / len(known),
        "low": min(value["low"] for value in known),
        "high": max(value["high"] for value in known),
    }


def _of_cell(cell: dict[str, Any], section: str, key: str) -> dict[str, float] | None:
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
                found = {name: find_cells(cells, subject=name, state=state, site=site, arm=arm) for name in subjects}
                for section, key, words, definition in wanted:
                    values = {name: _number(group, section, key) for name, group in found.items()}
                    if any(values[name] is None for name in subjects if name != "C"):  # C has crosscoders only
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


def answer(cells: Sequence[dict[str, Any]], subjects: dict[str, Any], judged: dict[str, Any] | None) -> list[str]:
    """The answer in two sentences: the verdict, and how far the ratio moves with the estimator and without training."""
    if judged is None:
        return _answer_for_one(cells, next(iter(subjects)))
    n = subjects["A"]["parameters"]["non_embedding"]
    losses = ", ".join(f"{subject['held_out_loss']:.3f} ({name})" for name, subject in subjects.items())
    shapes = ", ".join(f"{name} {one['n_layers']} layers of {one['d_model']}" for name, one in subjects.items())
    second = f"Models of {n:,} parameters in A's blocks ({shapes}) with held-out losses of {losses} nats a token"
    by_load, by_count = (_spread(judged, kind) for kind in ("load", "count"))
    if by_load:
        second += f"; on what blocks write, R (B's density over A's) is {by_load} by the entropy load of the features"
    if by_count:
        second += f" and {by_count} by their number, which full dictionaries of one size all but fix"
    return [judged["sentence"], second + "; 2 would be the paradox and 1 reconciliation."]


def _spread(judged: dict[str, Any], kind: str) -> str:
    """From the lowest to the highest R of one kind of estimator on the primary site, and of the untrained pair."""
    found = [row for row in judged["estimators"] if row["site"] == evidence.PRIMARY_SITE]
    found = [row for row in found if row["estimator"].startswith(kind)]
    said = []
    for state in ("trained", "untrained"):
        values = [row[state]["mean"] for row in found if row[state] is not None]
        if values:
            said.append(f"{min(values):.2f} to {max(values):.2f}")
    return "" if not said else said[0] if len(said) == 1 else f"{said[0]} (untrained {said[1]})"


def _answer_for_one(cells: Sequence[dict[str, Any]], name: str) -> list[str]:
    banks = find_cells(cells, subject=name, state="trained", site="residual", arm="layerwise")
    crosscoders = find_cells(cells, subject=name, state="trained", site="residual", arm="crosscoder")
    if not banks or not crosscoders:
        return ["One of the two arms is missing.", "Nothing can be compared."]
    bank, cross = banks[0], crosscoders[0]
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
            found = {name: find_cells(cells, subject=name, state="trained", site=site, arm=arm) for name in names}
            found = {name: group for name, group in found.items() if group}
            if not found:
                continue
            for section, key, words, tolerance in (
                ("counts", "dictionary_size", "dictionary size", 0.0),
                ("quality", "explained_variance", "explained variance", 0.05),
                ("quality", "l0_token", "L0 of a token", 0.05),
            ):
                values = {name: _number(group, section, key) for name, group in found.items()}
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
