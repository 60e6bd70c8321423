"""What a study's `results.json` may hold: `validate_results` refuses anything else by its path.

The keys, their units and their meaning are documented in `docs/results.md`.
"""

from __future__ import annotations

import itertools
from typing import Any

from crosscoder.results.specs import (
    Spec,
    boolean,
    count,
    either,
    fail,
    keyed_by_name,
    list_of,
    number,
    one_of,
    optional,
    plain,
    seed_range,
    share,
    table,
    text,
)

SCHEMA = "crosscoder.results/2"
SITES = ("residual", "write")
ARMS = ("crosscoder", "layerwise")
STATES = ("trained", "untrained", "shuffled")
ROLES = ("main", "size", "k")
GROUPS = ("subject", "per-layer", "cross-layer", "control")
KINDS = ("aspect_ratio", "subject_study")
MAX_HEATMAP_ROWS = 200


def _histogram(value: Any, path: str) -> None:
    table({"edges": list_of(share, least=2), "counts": list_of(number)})(value, path)
    edges = value["edges"]
    if len(value["counts"]) != len(edges) - 1:
        fail(f"{path}.counts", f"{len(edges) - 1} counts for {len(edges)} edges", value["counts"])
    if any(b <= a for a, b in itertools.pairwise(edges)):
        fail(f"{path}.edges", "increasing edges", edges)


def _heatmap(cell: dict[str, Any], path: str) -> None:
    rows, n_layers = cell["heatmap"], len(cell["layers"])
    if len(rows) > MAX_HEATMAP_ROWS:
        fail(f"{path}.heatmap", f"at most {MAX_HEATMAP_ROWS} features", f"{len(rows)} features")
    for i, row in enumerate(rows):
        if len(row) != n_layers:
            fail(f"{path}.heatmap[{i}]", f"{n_layers} shares, one a label in layers", row)
        if abs(sum(row) - 1) > 0.01:
            fail(f"{path}.heatmap[{i}]", "shares that sum to 1", sum(row))


def _spread_cell(value: Any, path: str) -> None:
    _SPREAD_FIELDS(value, path)
    _heatmap(value, path)


_maybe = optional(number)
_summary = keyed_by_name(optional(seed_range))
_PARAMETERS = table({"non_embedding": count, "embedding": count, "norms": count})
_CURVE_POINT = table({"step": count, "tokens": count, "held_out_loss": number})
_RUN = table({"seed": count, "held_out_loss": number, "tokens": count, "untrained_loss": number})
_SUBJECT = table(
    {
        "name": text,
        "n_layers": count,
        "d_model": count,
        "parameters": _PARAMETERS,
        "neurons_per_layer": count,
        "total_neurons": count,
        "held_out_loss": _maybe,
        "held_out_loss_unit": text,
        "tokens": optional(count),
        "epochs": _maybe,
        "curve": list_of(_CURVE_POINT),
        "untrained_loss": _maybe,
        "runs": list_of(_RUN),
        "description": text,
    },
    may_lack=("runs",),
)
_MATCHED_ITEM = table(
    {
        "quantity": text,
        "values": keyed_by_name(optional(either(number, text, "a finite number or a string"))),
        "matched": optional(boolean),
        "note": text,
    }
)
_TABLE_ROW = table(
    {
        "quantity": text,
        "values": keyed_by_name(optional(seed_range)),
        "ratio": optional(seed_range),
        "definition": optional(text),
        "group": one_of(*GROUPS),
    }
)
_COUNT_SEED = table(
    {
        "seed": count,
        "dictionary_size": count,
        "alive": count,
        "alive_per_layer": optional(list_of(count)),
        "dead_share": share,
        "ultra_dense": count,
        "distinct": optional(count),
        "merged": optional(count),
        "merged_low": optional(count),
        "merged_high": optional(count),
        "features_per_layer": number,
        "per_neuron_layer": number,
        "per_neuron_joint": _maybe,
        "entropy_load": number,
        "effective_dimension": _maybe,
    }
)
PAIR_FIELDS = ("chapman", "q_adjacent", "q_same", "survival", "lifespan", "corrected")
_PAIR = table({"matched": number, "matched_share": share} | dict.fromkeys(PAIR_FIELDS, _maybe))
_WHERE: dict[str, Spec] = {
    "subject": text,
    "state": one_of(*STATES),
    "site": one_of(*SITES),
    "n_features": count,
    "k": count,
    "training_seed": count,
}
_ARM: dict[str, Spec] = {"arm": one_of(*ARMS), "role": one_of(*ROLES)}
_COUNT_CELL = table(
    {
        **_WHERE,
        **_ARM,
        "tokens_train": count,
        "tokens_held_out": count,
        "p_min": share,
        "per_seed": list_of(_COUNT_SEED, least=1),
        "pair": optional(_PAIR),
        "summary": _summary,
    }
)
_SPREAD_SEED = table(
    {
        "seed": count,
        "mean_rho": _maybe,
        "mean_rho_share": optional(share),
        "mean_lifespan": _maybe,
        "single_layer_share": share,
        "mean_adjacent_cosine": _maybe,
        "rho_histogram": _histogram,
        "lifespan_counts": list_of(count),
        "functional": optional(keyed_by_name(_maybe)),
    },
    may_lack=("functional",),
)
_SPREAD_FIELDS = table(
    {
        **_WHERE,
        "role": _ARM["role"],
        "per_seed": list_of(_SPREAD_SEED, least=1),
        "heatmap": list_of(list_of(share)),
        "layers": list_of(either(text, count, "a layer's label")),
        "summary": _summary,
    },
    may_lack=("role",),
)
_SPLICE_SITE = table({"site": text, "loss": number, "ablated_loss": number, "loss_recovered": _maybe, "kl": number})
_SPLICE = table(
    {
        "tokens": count,
        "ablation": one_of("mean", "zero"),
        "clean_loss": number,
        "sites": list_of(_SPLICE_SITE),
    }
)
_QUALITY_SEED = table(
    {
        "seed": count,
        "explained_variance": number,
        "explained_variance_per_layer": list_of(number),
        "l0_token": number,
        "l0_token_layer": number,
        "dead_share": share,
        "threshold": optional(list_of(number)),
        "splice": optional(_SPLICE),
    }
)
_QUALITY_CELL = table({**_WHERE, **_ARM, "per_seed": list_of(_QUALITY_SEED, least=1), "summary": _summary})
_GATE = table(
    {
        "name": text,
        "value": optional(either(number, text, "a finite number or a string")),
        "requirement": text,
        "passed": boolean,
    }
)
_ESTIMATE = optional(seed_range)
_STATISTIC = table(
    {"site": one_of(*SITES), "name": text, "words": text, "estimate": _ESTIMATE, "missing": optional(text)}
    | {"definition": text}
)
_ESTIMATOR = table(
    {"site": one_of(*SITES), "estimator": text, "primary": boolean, "trained": _ESTIMATE, "untrained": _ESTIMATE}
    | {"missing": optional(text), "definition": text}
)
POINT_FIELDS = ("features", "rho", "load", "d_eff_raw", "d_eff_weighted", "d_eff_debiased", "self_cosine")
POINT_FIELDS += ("matched_share", "explained_variance", "dead_share", "l0")
_POINT = table(
    {"site": one_of(*SITES), "subject": text, "state": one_of(*STATES), "training_seed": count}
    | dict.fromkeys(POINT_FIELDS, _maybe)
)
_AGREEMENT = table(
    {"u": _ESTIMATE, "null": number, "ceiling": _ESTIMATE, "floor": _maybe, "normalised": _ESTIMATE}
    | {"shares": keyed_by_name(number), "rates": optional(keyed_by_name(_maybe)), "missing": optional(text)}
)
_CONDITION = table(
    {"hypothesis": text, "statistic": text, "requirement": text, "measured": text, "met": optional(boolean)}
)
_JOINT_SEED = table(
    {"seed": count, "alive": count, "dead_share": share, "l0_token": number}
    | {"explained_variance_first": _maybe, "explained_variance_second": _maybe}
    | {"exclusive_first": share, "exclusive_second": share, "hidden_first": share, "hidden_second": share}
)
_JOINT = table(
    {"first": text, "second": text, "training_seeds": list_of(count), "state": one_of(*STATES)}
    | {"site": one_of(*SITES), "n_features": count, "k": count, "per_seed": list_of(_JOINT_SEED, least=1)}
)
_VERDICT = table(
    {
        "version": text,
        "label": text,
        "kinds": list_of(text),
        "universality": text,
        "sentence": text,
        "reasons": list_of(text),
        "notes": list_of(text),
        "gates": list_of(_GATE, least=1),
        "statistics": list_of(_STATISTIC),
        "estimators": list_of(_ESTIMATOR),
        "points": list_of(_POINT),
        "universality_by_site": keyed_by_name(_AGREEMENT),
        "rule": plain,
        "conditions": list_of(_CONDITION),
        "joint": list_of(_JOINT),
        "calibration": list_of(plain),
    },
    may_lack=("conditions", "joint"),
)
_PROVENANCE = table(
    {
        "schema": one_of(SCHEMA),
        "kind": one_of(*KINDS),
        "preset": text,
        "seconds": keyed_by_name(number),
        "tokens_fingerprint": text,
        "text": text,
        "command": list_of(text),
        "config": plain,
        "device": plain,
        "git_commit": optional(text),
        "python": text,
        "started": text,
        "versions": plain,
    },
    open_ended=True,
)
_RESULTS = table(
    {
        "verdict": optional(_VERDICT),
        "subjects": keyed_by_name(_SUBJECT, least=1),
        "matched": table({"items": list_of(_MATCHED_ITEM)}),
        "counts": table(
            {"answer": list_of(text, exactly=2), "table": list_of(_TABLE_ROW), "cells": list_of(_COUNT_CELL)}
        ),
        "spread": table({"cells": list_of(_spread_cell)}),
        "quality": table({"cells": list_of(_QUALITY_CELL)}),
        "definitions": keyed_by_name(text),
        "provenance": _PROVENANCE,
    }
)


def validate_results(results: Any) -> None:
    """None if `results` is what the report and its readers expect.

    Raises:
        ValueError: a key is missing or unknown, a value has the wrong type or is not finite, or a row
            cites a definition or subject that does not exist. The path, what was seen and what was
            expected are named.
    """
    _RESULTS(results, "results")
    subjects, definitions = results["subjects"], results["definitions"]
    for name in ("counts", "spread", "quality"):
        for i, cell in enumerate(results[name]["cells"]):
            if cell["subject"] not in subjects:
                fail(f"results.{name}.cells[{i}].subject", f"one of {list(subjects)}", cell["subject"])
    for i, row in enumerate(results["counts"]["table"]):
        if row["definition"] is not None and row["definition"] not in definitions:
            path = f"results.counts.table[{i}].definition"
            fail(path, f"null or one of {sorted(definitions)}", row["definition"])
    judged = results["verdict"] or {"statistics": [], "estimators": []}
    for name in ("statistics", "estimators"):
        for i, row in enumerate(judged[name]):
            if row["definition"] not in definitions:
                fail(f"results.verdict.{name}[{i}].definition", f"one of {sorted(definitions)}", row["definition"])
    rows = [("counts.table", row) for row in results["counts"]["table"]]
    rows += [("matched.items", row) for row in results["matched"]["items"]]
    for where, row in rows:
        for key in row["values"]:
            if key not in subjects:
                fail(f"results.{where} ({row['quantity']}).values", f"only {list(subjects)}", key)
